"""Words that have to fit into a given width, on a terminal or in a picture."""


def elide(text: str, width: int) -> str:
    """Take the middle out of a text that is too long: names and module paths tell most at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
