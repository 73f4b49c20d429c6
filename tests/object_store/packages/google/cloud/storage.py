"""A stand-in for the package google-cloud-storage, which Orbax asks for a bucket's kind before it deletes."""

import types


class Client:
    """A client that knows buckets without a hierarchy of folders."""

    def get_bucket(self, name: str) -> types.SimpleNamespace:
        """Return a bucket."""
        return types.SimpleNamespace(name=name, hierarchical_namespace_enabled=False)
