"""nbgrader's feedback pages, made in a fraction of the time: what is the same in every submission is rendered once.

nbconvert renders each page's prose and given code anew, and parses the whole page again for attributes of elements that
nbgrader's template does not have. Here rendered pieces are kept by their text, and the page is left as it is.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

from jinja2 import BytecodeCache, pass_context
from jinja2.bccache import Bucket
from nbconvert.exporters import HTMLExporter
from nbconvert.exporters.templateexporter import TemplateExporter
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
from nbformat import NotebookNode

KEPT = 4_000  # rendered pieces
_markdown: dict[str, str] = {}


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
        return TemplateExporter.from_notebook_node(self, nb, resources, **named)


@cache
def _highlighter(lexer: str | None) -> Any:
    """A filter that highlights code, each text once."""
    once = lru_cache(KEPT)(lambda source, language: Highlight2HTML(pygments_lexer=lexer)(source, language))
    return lambda source, language=None, metadata=None: once(source, language)
