"""nbgrader's feedback pages, made in a fraction of the time: what is the same in every submission is rendered once.

nbconvert renders each page's prose and given code anew, and parses the whole page again for attributes of elements that
nbgrader's template does not have. Here rendered pieces are kept by their text, and the page is left as it is, but for
names in its table of contents and borders of its tables. It ends in a comment on what it says of grades, so that a page
is known to be older than what a person gave since.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import BytecodeCache, pass_context
from jinja2.bccache import Bucket
from nbconvert.exporters import HTMLExporter
from nbconvert.exporters.templateexporter import TemplateExporter
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
from nbformat import NotebookNode

KEPT = 4_000  # rendered pieces
STYLE = """<style>
.rendered_html table { margin: 0.5em 0 1em; }
.rendered_html th, .rendered_html td { border: 1px solid #949494; padding: 0.2em 0.6em; text-align: left; }
</style>
"""
KINDS = {"comment-written_": "Comment on written answer ", "comment-": "Comment on ", "test_": "",
         "predict_": "Prediction ", "written_": "Written answer "}  # fmt: skip
_NAMELESS = re.compile(rf'(<a href="#({"|".join(KINDS)})(\w+)">)(?:Test cell|Written response|Comment)(?=</a>)')
_markdown: dict[str, str] = {}


def mark_of(scores: Mapping[str, float], comments: Mapping[str, str | None], penalty: float) -> str:
    """What a page that says this ends in: points by cell, comments by cell, and the points that being late costs."""
    told = [{name: round(float(score), 6) for name, score in scores.items()},
            {name: text for name, text in comments.items() if text}, round(float(penalty), 6)]
    return f"<!-- grades {hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]} -->"


def says(page: Path, mark: str) -> bool:
    """Whether a page ends in this mark."""
    with page.open("rb") as file:
        file.seek(max(0, page.stat().st_size - 200))
        return mark.encode() in file.read()


class _Compiled(BytecodeCache):
    """Jinja's templates, compiled once in a process: every exporter makes an environment of its own."""

    kept: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self.kept:
            bucket.bytecode_from_string(self.kept[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self.kept[bucket.key] = bucket.bytecode_to_string()


class FeedbackExporter(HTMLExporter):
    """An HTMLExporter that keeps what it rendered."""

    def _create_environment(self) -> Any:
        environment = super()._create_environment()
        environment.bytecode_cache = _Compiled()
        return environment

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        """As nbconvert's; prose without attachments is rendered once."""
        if context.get("cell", {}).get("attachments"):
            return super().markdown2html(context, source)
        if source not in _markdown:
            if len(_markdown) >= KEPT:
                _markdown.clear()
            _markdown[source] = super().markdown2html(context, source)
        return _markdown[source]

    def from_notebook_node(self, nb: NotebookNode, resources: Any = None, **named: Any) -> tuple[str, Any]:
        """As nbconvert's, without parsing the page again."""
        language = nb.metadata.get("language_info", {})
        resources = self._init_resources(resources)
        self.register_filter("highlight_code", _highlighter(language.get("pygments_lexer", language.get("name"))))
        self.register_filter("filter_data_type", WidgetsDataTypeFilter(
            notebook_metadata=self._nb_metadata, parent=self, resources=resources))
        page, resources = TemplateExporter.from_notebook_node(self, nb, resources, **named)
        page = page.replace("</head>", f"{STYLE}</head>", 1)
        page = _NAMELESS.sub(lambda link: f"{link[1]}{KINDS[link[2]]}{link[3]}", page)
        return f"{page}\n{self._mark}\n", resources

    def _preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        """As nbconvert's, after which the cells say what the gradebook says."""
        nb, resources = super()._preprocess(nb, resources)
        cells = [cell.metadata["nbgrader"] for cell in nb.cells if cell.metadata.get("nbgrader", {}).get("grade_id")]
        self._mark = mark_of({one["grade_id"]: one["score"] for one in cells if "score" in one},
                             {one["grade_id"]: one["comment"] for one in cells if "comment" in one},
                             resources.get("nbgrader", {}).get("late_penalty", 0.0))
        return nb, resources


@cache
def _highlighter(lexer: str | None) -> Any:
    """A filter that highlights code, each text once."""
    once = lru_cache(KEPT)(lambda source, language: Highlight2HTML(pygments_lexer=lexer)(source, language))
    return lambda source, language=None, metadata=None: once(source, language)
