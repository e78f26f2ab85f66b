"""The colours of pages and pictures, for a light and a dark background."""

from __future__ import annotations

LIGHT = {
    "page": "#f6f7f9", "card": "#ffffff", "edge": "#dfe3e8", "text": "#1b2128", "quiet": "#5a6572", "grid": "#e9ecf0",
    "main": "#2159d6", "second": "#c2570c", "bad": "#c81e1e", "notice": "#fdf0ee",
    "cause-0": "#2159d6", "cause-1": "#6ea0f5", "cause-2": "#c2570c", "cause-3": "#f0a868",
    "cause-4": "#2f7d5b", "cause-5": "#83c5a4", "cause-6": "#7d4fc4", "cause-7": "#8a94a0",
}  # fmt: skip
DARK = {
    "page": "#12161b", "card": "#1a2027", "edge": "#2d3641", "text": "#e4e9ef", "quiet": "#98a4b1", "grid": "#27303a",
    "main": "#7aa8ff", "second": "#f59e57", "bad": "#ff6b6b", "notice": "#3a2022",
    "cause-0": "#7aa8ff", "cause-1": "#3f68b3", "cause-2": "#f59e57", "cause-3": "#a8632a",
    "cause-4": "#6fc79c", "cause-5": "#3a7d5d", "cause-6": "#b494f0", "cause-7": "#7a8591",
}  # fmt: skip
"""By the name of the CSS variable. `cause-N` is the colour of the N-th cause that memory is held for."""


def variables() -> str:
    """Return the colours as CSS variables, the dark ones for readers who prefer those."""
    dark = f"@media (prefers-color-scheme: dark) {{\n:root {{ {_declared(DARK)} }}\n}}"
    return f":root {{ color-scheme: light dark; {_declared(LIGHT)} }}\n{dark}\n{_classes()}"


def _declared(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _classes() -> str:
    names = [name for name in LIGHT if name.startswith("cause-")]
    return "\n".join(f".{name} {{ fill: var(--{name}); background: var(--{name}) !important; }}" for name in names)
