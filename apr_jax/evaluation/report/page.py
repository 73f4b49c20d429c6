"""What all pages share: templates, drawings and data that stand in one self-contained file."""

import json
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """A page from templates/. Values are escaped unless they are Markup; one missing raises jinja2.UndefinedError."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read_template), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.globals["asset"] = lambda name: Markup(read_template(name))
    return environment.get_template(template).render(**values)


def read_template(name: str) -> str:
    """A file of templates/, which are part of the package."""
    return (resources.files("apr_jax.evaluation.report") / "templates" / name).read_text(encoding="utf-8")


def embed(value: Any) -> Markup:
    """JSON that may stand inside a script element, whatever text it carries."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def svg(body: str, width: int, height: int) -> Markup:
    """A drawing: a body of `width` x `height` units that takes what room there is."""
    return Markup(
        f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" preserveAspectRatio="xMinYMin meet">{body}</svg>'
    )


def standalone_svg(body: str, width: int, height: int) -> str:
    """A drawing as a file of its own: it brings its colours, light and dark, and its background."""
    background = f'<rect class="background" width="{width}" height="{height}"/>'
    dark = f'<style media="(prefers-color-scheme: dark)">{read_template("figure.dark.css")}</style>'
    style = f"<style>{read_template('figure.css')}</style>{dark}"
    return str(svg(style + background + body, width, height))
