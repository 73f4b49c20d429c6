"""A stand-in for the package gcsfs: objects are the files below OBJECT_STORE (see ../server.py).

As in the real store there are no folders: one "is there" while an object lies in it. An object is written as a whole
when its file is closed, and cannot grow.
"""

import io
import os
import pathlib
import threading
from typing import Any

from fsspec.spec import AbstractFileSystem


class GCSFileSystem(AbstractFileSystem):
    """A store of objects, gs://BUCKET/NAME."""

    protocol = ("gs", "gcs")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        name = self._strip_protocol(path).strip("/")
        place = _place(name)
        if place.is_file():
            found = [self.info(name)]
        else:
            children = sorted(place.iterdir()) if place.is_dir() else []
            found = [self._about(f"{name}/{child.name}", child) for child in children if _is_there(child)]
            if not found:
                raise FileNotFoundError(path)
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = self._strip_protocol(path).strip("/")
        if not _is_there(_place(name)):
            raise FileNotFoundError(path)
        return self._about(name, _place(name))

    def _about(self, name: str, place: pathlib.Path) -> dict[str, Any]:
        if place.is_file():
            return {"name": name, "type": "file", "size": place.stat().st_size, "mtime": place.stat().st_mtime}
        return {"name": name, "type": "directory", "size": 0}

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Do nothing, as the store."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing, as the store."""

    def rmdir(self, path: str) -> None:
        """Do nothing, as the store."""

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        with self.open(path2, "wb") as target:
            target.write(_place(self._strip_protocol(path1)).read_bytes())

    def _rm(self, path: str) -> None:
        place = _place(self._strip_protocol(path))
        if place.is_file():
            place.unlink()

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        place = _place(self._strip_protocol(path))
        if mode == "rb":
            return place.open("rb")
        if mode != "wb":
            raise NotImplementedError(f"mode {mode}: an object cannot grow")
        return _Object(place)


class _Object(io.BytesIO):
    def __init__(self, place: pathlib.Path) -> None:
        super().__init__()
        self._place = place

    def close(self) -> None:
        if not self.closed:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._place.with_name(f".{self._place.name}.{threading.get_ident()}")
            temporary.write_bytes(self.getvalue())
            temporary.replace(self._place)
        super().close()


def _place(name: str) -> pathlib.Path:
    return pathlib.Path(os.environ["OBJECT_STORE"], name)


def _is_there(place: pathlib.Path) -> bool:
    return place.is_file() or (place.is_dir() and any(child.is_file() for child in place.rglob("*")))
