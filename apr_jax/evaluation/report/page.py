"""Templates, drawings and data that make one self-contained page."""

import json
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Fill a template. Values are escaped unless they are Markup. A missing one raises jinja2.UndefinedError."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read_template), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.globals["asset"] = lambda name: Markup(read_template(name))
    return environment.get_template(template).render(**values)


def read_template(name: str) -> str:
    """Read a file of templates/, which is part of the package."""
    return (resources.files("apr_jax.evaluation.report") / "templates" / name).read_text(encoding="utf-8")


def embed(value: Any) -> Markup:
    """Return JSON that may stand inside a script element, whatever text it carries."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def svg(body: str, width: int, height: int) -> Markup:
    """Return a drawing with a body of `width` x `height` units, which fills the room that it gets."""
    return Markup(
        f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" preserveAspectRatio="xMinYMin meet">{body}</svg>'
    )


def standalone_svg(body: str, width: int, height: int) -> str:
    """Return a drawing as a file of its own, with its colours for light and dark and its background."""
    background = f'<rect class="background" width="{width}" height="{height}"/>'
    dark = f'<style media="(prefers-color-scheme: dark)">{read_template("figure.dark.css")}</style>'
    style = f"<style>{read_template('figure.css')}</style>{dark}"
    return str(svg(style + background + body, width, height))
