"""Sentences of a document: what a claims file quotes of them, and a draft of such a file."""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files

from nanogauge.analysis.claims import Claim, Claims

TODO = "TODO"
MOST_UNQUOTED = 1 / 3
"""Largest share of a sentence's letters that may be in no quotation."""
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_RANGE = re.compile(rf"({_NUMBER})(?:\s*(?:[-–—~～]|to|至|到)\s*({_NUMBER}))?\s*")
_WORDS = files("nanogauge.analysis").joinpath("claim_words.toml").read_text(encoding="utf-8")
_GUESSES = tomllib.loads(_WORDS)["guess"]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text or of Markdown; a table row is one, headings are none."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^.*\n(?=[\s:|-]*-{3}[\s:|-]*$)", "", text, flags=re.MULTILINE)  # of a table
    found: list[str] = []
    for raw in text.splitlines():
        line = re.sub(r"^\s*(?:[-*+>]|\d+\.)\s+|\*\*|`", "", raw).strip()
        if line.startswith("|"):
            found.append(" | ".join(cell.strip() for cell in line.strip("|").split("|")))
        elif not line.startswith("#"):
            found += re.split(r"(?<=[。！？])|(?<=[.!?])\s+", line)
    return [" ".join(sentence.split()) for sentence in found if re.search(r"\w", sentence)]


def _pieces(quote: str) -> list[str]:
    """Return the quotations of a statement, with the spaces of sentences()."""
    return [" ".join(piece.split()) for piece in quote.split("[…]")]


def problems(text: str, claims: Claims) -> Iterator[str]:
    """Yield what is wrong with a claims file, compared with the text that it quotes.

    A quotation covers only the sentence it lies in, and a number outside of all quotations, or many letters, leave a
    sentence uncovered.
    """
    known, quoted = sentences(text), set[str]()
    for statement in (*claims.claim, *claims.unscored):
        name = statement.key if isinstance(statement, Claim) else "unscored"
        quoted.update(_pieces(statement.quote))
        for piece in _pieces(statement.quote):
            if not any(piece in sentence for sentence in known):
                spans = piece in " ".join(known)
                why = "spans several sentences" if spans else "is not in the text"
                yield f"{name}: the quotation {why}: {piece}"
        if TODO in (statement.english, getattr(statement, "why", "")):
            yield f"{name}: complete what is {TODO}: {statement.quote}"
        if isinstance(statement, Claim) and not (statement.formula or statement.reading):
            found = [guess for guess, *_ in guesses(statement.quote)]
            units = {guess["unit"] for guess in found if guess["row"] == statement.row}
            if units and statement.unit not in units:
                yield f"{name}: the unit is {statement.unit}, the quotation has {min(units)}"
    for sentence in known:
        rest = sentence
        for piece in sorted(quoted, key=len, reverse=True):
            rest = rest.replace(piece, " ")
        left, letters = (len(re.findall(r"\w", part)) for part in (rest, sentence))
        if left > MOST_UNQUOTED * letters or re.search(r"\d", rest):
            yield f"not covered: {sentence}"


def guesses(sentence: str) -> Iterator[tuple[dict[str, str], list[float], float]]:
    """Yield each number in a sentence whose quantity can be guessed.

    That is its entry of claim_words.toml, its value or both ends, and half of its last digit.
    """
    for match in _RANGE.finditer(sentence):
        after = sentence[match.end() :]
        for guess in _GUESSES:
            near = re.search(guess.get("near", ""), sentence, re.IGNORECASE)
            if near and re.match(guess["after"], after, re.IGNORECASE):
                numbers = [number.replace(",", "") for number in match.groups() if number]
                scale, digits = guess.get("scale", 1), len(numbers[0].partition(".")[2])
                yield guess, [scale * float(number) for number in numbers], scale / 2 / 10**digits
                break


def draft(text: str, title: str) -> str:
    """Return a skeleton of a claims file: each sentence with a guess at its id, unit and numbers.

    A person completes it: what is not guessed is TODO.
    """
    out = [f"[document]\ntitle = {json.dumps(title, ensure_ascii=False)}\n"]
    keys: Counter[str] = Counter()
    for sentence in sentences(text):
        lines = [f"quote = {json.dumps(sentence, ensure_ascii=False)}"]
        lines += [f'english = "{TODO}"'] * (not sentence.isascii())
        found = list(guesses(sentence))
        if not re.search(r"\d", sentence):
            out.append("\n".join(["[[unscored]]", *lines, f'why = "{TODO}"\n']))
        elif not found:
            out.append("\n".join(["[[claim]]", f'key = "{TODO}"', *lines, ""]))
        for guess, numbers, rounding in found:
            row = guess["row"]
            keys[row] += 1
            key = row if keys[row] == 1 else f"{row}.{keys[row]}"
            names = ("low", "high") if len(numbers) > 1 else ("value", "rounding")
            ends = zip(names, [*numbers, rounding], strict=False)
            claimed = [f"{name} = {end:.12g}" for name, end in ends]
            named = ["[[claim]]", f'key = "{key}"', f'unit = "{guess["unit"]}"']
            out.append("\n".join([*named, *claimed, *lines, ""]))
    return "\n".join(out)
