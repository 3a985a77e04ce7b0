r"""Tables for LaTeX: a file to \input, with booktabs' rules, for pdflatex, XeLaTeX and LuaLaTeX.

Needs \usepackage{booktabs, graphicx}, a table that may be longer than a page (`long_table`) longtable as well. A table
that is wider than the text is scaled down to it; one of many columns spans both columns of a page, its headings turned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDE = 9  # columns; more have their headings turned

# Specials, and what the fonts of pdflatex lack.
_ESCAPES = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    # A row's end takes a star or brackets that follow as its own.
    **{sign: f"{{{sign}}}" for sign in "[]*"},
    "`": r"\textasciigrave{}",
    "\n": " ",
}


@dataclass(frozen=True)
class Row:
    """A row's cells as plain text; `rule`: a line above it."""

    cells: Sequence[str]
    bold: bool = False
    rule: bool = False


def escape(text: str) -> str:
    """Any text as LaTeX prints it; letters beyond ASCII stay, which pdflatex prints where its fonts have them."""
    made, last = [], ""
    for sign in text:
        apart = "{}" if sign == last and sign in "-'" else ""  # else the two would become another sign
        made.append(apart + _ESCAPES.get(sign, sign))
        last = sign
    return "".join(made)


def prose(text: str) -> str:
    """A sentence: `so` becomes typewriter, an address may be broken after each slash."""
    parts = [escape(part) if i % 2 == 0 else rf"\texttt{{{escape(part)}}}" for i, part in enumerate(text.split("`"))]
    words = "".join(parts).split(" ")
    return " ".join(word.replace("/", r"/\allowbreak{}") if "://" in word else word for word in words)


def _row(cells: Iterable[str]) -> str:
    return f"    {' & '.join(cells)} \\\\"


def _body(header: Sequence[str], left: int, rows: Sequence[Row], turned: bool) -> list[str]:
    """Heading, rules and rows."""
    names = [
        rf"\rotatebox{{90}}{{{escape(name)}}}" if turned and i >= left else escape(name)
        for i, name in enumerate(header)
    ]
    lines = [r"    \toprule", _row(names), r"    \midrule"]
    for i, row in enumerate(rows):
        if row.rule and i:
            lines.append(r"    \addlinespace")
        cells = list(map(escape, row.cells))
        if row.bold:
            cells = [rf"\textbf{{{cell}}}" if j < left and cell else cell for j, cell in enumerate(cells)]
        lines.append(_row(cells))
    return [*lines, r"    \bottomrule"]


def table(
    caption: str, label: str, header: Sequence[str], left: int, rows: Sequence[Row], notes: Sequence[str] = ()
) -> str:
    """A float; the first `left` columns are aligned to the left, the rest to the right. All texts are plain."""
    turned = len(header) > WIDE
    kind = "table*" if turned else "table"
    width = r"\textwidth" if turned else r"\linewidth"
    lines = [
        r"% Written by pipeline.tabulate. Needs \usepackage{booktabs, graphicx}",
        rf"\begin{{{kind}}}",
        r"  \centering",
        rf"  \caption{{{prose(caption)}}}",
        rf"  \label{{{label}}}",
        r"  \smallskip" + (r"\setlength{\tabcolsep}{3pt}" if turned else ""),
        rf"  \resizebox{{\ifdim\width>{width} {width}\else\width\fi}}{{!}}{{%",
        rf"  \begin{{tabular}}{{@{{}}{'l' * left}{'r' * (len(header) - left)}@{{}}}}",
        *_body(header, left, rows, turned),
        r"  \end{tabular}}",
    ]
    if notes:
        lines += [r"  \par\smallskip", rf"  \begin{{minipage}}{{{width}}}\footnotesize\raggedright"]
        lines += [rf"    {prose(note)}\par" for note in notes]
        lines.append(r"  \end{minipage}")
    return "\n".join([*lines, rf"\end{{{kind}}}"]) + "\n"


def long_table(caption: str, label: str, header: Sequence[str], left: int, rows: Sequence[Row]) -> str:
    """A table of many rows, which goes on over pages; above three columns of numbers their headings are turned."""
    lines = _body(header, left, rows, len(header) - left > 3)
    head, body = lines[:3], lines[3:]
    lines = [
        r"% Written by pipeline.tabulate. Needs \usepackage{booktabs, graphicx, longtable}",
        rf"\begin{{longtable}}{{{'l' * left}{'r' * (len(header) - left)}}}",
        rf"  \caption{{{prose(caption)}}}\label{{{label}}}\\",
        *head,
        r"    \endhead",
        *body,
    ]
    return "\n".join([*lines, r"\end{longtable}"]) + "\n"
