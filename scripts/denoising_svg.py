"""Draw the animation of the README: one question, answered by both embedded diffusion models, one frame per forward.

    python scripts/denoising_svg.py [docs/images/denoising.svg]

What moves is what the engine reports of every forward (`trace=True`), nothing is made up. The SVG needs no script and shows the
whole answer where animations are off.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import unmask

QUESTION = (
    "Jonas is a nurse from Kibumar and has a snake. Iris is a painter from Modeford and has a hamster. Which town is Iris "
    "from? Quote what says so, then end with 'Answer: <word>'."
)
SHOWN = (
    "Jonas is a nurse from Kibumar and has a snake. Iris is a painter from Modeford",
    "and has a hamster. Which town is Iris from?",
)
PANELS = {
    "smollm2-135m-diffusion": "speculative: drafts, verified in the next forward",
    "smollm2-135m-converted": "converted: what is confident enough is uncovered",
}
WIDTH, CHAR, LINE, PANEL, TOP = 720, 8.4, 22, 64, 78
SECONDS_PER_FORWARD, PAUSE = 0.9, 3


@dataclass(frozen=True)
class Cell:
    """One token of an answer: its text, the forward that decided it, and forward -> what was guessed before that."""

    text: str
    decided: int
    guesses: dict[int, str]


def cells(name: str) -> tuple[list[Cell], int, int]:
    """An answer as cells, its number of tokens and of forwards."""
    model = unmask.load(name, quantize="none")
    answer = model.generate(QUESTION, max_new_tokens=48, trace=True)
    assert answer.trace is not None
    assert model.tokenizer is not None
    start = len(model.encode_prompt(QUESTION))
    spell = model.tokenizer.decode
    decided: dict[int, int] = {}
    guesses: dict[int, dict[int, str]] = {}
    for step in answer.trace:
        for position, (token, guess) in enumerate(zip(step.tokens, step.guess, strict=True), start=step.start):
            if token is not None:
                decided.setdefault(position, step.forwards)
            elif guess is not None:
                guesses.setdefault(position, {})[step.forwards] = spell([guess])
    shown = [
        Cell(spell([token]), decided[position], guesses.get(position, {}))
        for position, token in enumerate(answer.ids, start=start)
        if spell([token])
    ]
    return shown, len(answer.ids), answer.forwards


def appear(first: int, last: int | None, frames: int, duration: float) -> str:
    """Visible from the end of forward `first` until that of forward `last`."""
    stop = frames if last is None else last
    times = [0.0, first / frames, stop / frames] if stop < frames else [0.0, first / frames]
    values = ["0", "1", "0"][: len(times)]
    keys = ";".join(f"{time:.4f}" for time in times)
    return (
        f'<animate attributeName="opacity" calcMode="discrete" dur="{duration:g}s" repeatCount="indefinite" '
        f'values="{";".join(values)}" keyTimes="{keys}"/>'
    )


def panel(name: str, answer: tuple[list[Cell], int, int], top: int, frames: int) -> list[str]:
    """One model's answer."""
    shown, num_tokens, forwards = answer
    duration = frames * SECONDS_PER_FORWARD
    lines = [f'<text x="16" y="{top}" class="name">{name}</text><text x="216" y="{top}" class="note">{PANELS[name]}</text>']
    x, y = 16.0, top + 26
    for cell in shown:
        width = len(cell.text) * CHAR
        if x + width > WIDTH - 16:
            x, y = 16.0, y + LINE
        place = f'x="{x:.1f}" y="{y}" textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs" xml:space="preserve"'
        for forward, guess in cell.guesses.items():
            hide = min([other for other in (*cell.guesses, cell.decided) if other > forward])
            lines.append(
                f'<text {place} class="guess" opacity="0">{escape(guess)}{appear(forward, hide, frames, duration)}</text>'
            )
        if cell.guesses:
            mask = f'x="{x + 1:.1f}" y="{y - 13}" width="{max(width - 2, 3):.1f}" height="17" rx="3" class="mask" opacity="0"'
            lines.append(f"<rect {mask}>{appear(min(cell.guesses), cell.decided, frames, duration)}</rect>")
        lines.append(f'<text {place} class="token">{escape(cell.text)}{appear(cell.decided, None, frames, duration)}</text>')
        x += width
    counts = f"{num_tokens} tokens in {forwards} forwards; token by token it takes {num_tokens}"
    lines.append(f'<text x="16" y="{y + LINE}" class="count">{counts}{appear(forwards, None, frames, duration)}</text>')
    return lines


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/denoising.svg")
    answers = {name: cells(name) for name in PANELS}
    frames = max(forwards for _, _, forwards in answers.values()) + PAUSE
    body: list[str] = []
    for number, (name, answer) in enumerate(answers.items()):
        body += panel(name, answer, TOP + number * (PANEL + LINE), frames)
    height = TOP + len(PANELS) * (PANEL + LINE) - 10
    question = "".join(
        f'<text x="16" y="{24 + 18 * number}" class="note">{escape(line)}</text>' for number, line in enumerate(SHOWN)
    )
    style = (
        "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}.note{fill:#7d8590;font-size:13px}"
        ".name{fill:#009688;font-size:13px;font-weight:600}.count{fill:#009688;font-size:13px}"
        ".token{fill:#24a148}.guess{fill:#7d8590;font-style:italic}.mask{fill:#7d8590;fill-opacity:.18}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img"'
    title = "Two diffusion language models answer a question, several tokens per forward"
    out.write_text("\n".join([f"{head}><title>{title}</title><style>{style}</style>", question, *body, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
