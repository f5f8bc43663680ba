"""Write and check a claims file: what a document says about a run, sentence by sentence."""

from collections.abc import Sequence
from pathlib import Path

from nanogauge.analysis.claims import load_claims
from nanogauge.analysis.sentences import draft, problems, sentences
from nanogauge.cli import Parser
from nanogauge.errors import BadInput
from nanogauge.files import read_whole

_EXAMPLES = """
  %(prog)s draft answer.md > claims.toml
  %(prog)s check claims.toml answer.md
"""


def main(arguments: Sequence[str]) -> int:
    """Print a draft (0), or what is wrong with a claims file (1 if anything is)."""
    parser = Parser(f"{__doc__}\n{_EXAMPLES}", usage="%(prog)s draft TEXT | check FILE TEXT")
    parser.add_argument("action", choices=("draft", "check"))
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE")
    given = parser.parse(arguments)
    if len(given.paths) != (1 if given.action == "draft" else 2):
        raise BadInput("give draft TEXT, or check FILE TEXT.")
    try:
        text = read_whole(given.paths[-1]).decode()
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {given.paths[-1]}: {error}.") from None
    if given.action == "draft":
        print(draft(text, given.paths[0].stem), end="")
        return 0
    found = list(problems(text, load_claims(given.paths[0])))
    for problem in found:
        print(problem)
    covered = len(sentences(text)) - sum(one.startswith("not covered") for one in found)
    print(f"{covered} of {len(sentences(text))} sentences covered; {len(found)} problems.")
    return 1 if found else 0
