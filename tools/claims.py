"""What the paper concludes, as tests of the runs here: does each of its claims hold?

    python -m tools.experiments claims --datasets demo --seeds 0,1,2

The claims are data, paper_claims.json. A claim is a set of pairs of methods. It holds where every
pair agrees, and is contradicted where one says the opposite. A pair agrees where the first method
is better, or, by a claim of parity, not clearly worse. evidence.py says when a method is better.
"""

from collections import Counter
from dataclasses import asdict
from itertools import groupby, product

from tools.cells import CLAIMS, NOT_TESTED, Cell, Plan, heading, terms_of
from tools.evidence import NO, UNTOLD, YES, differences
from tools.finished import Finished

MISSING = "missing"
ORDER = (NO, MISSING, UNTOLD, YES)  # what one pair says counts before what others say
PLACE = ("sentence", "where", "test", "dataset", "shots", "setting")
WORDS = {YES: "**holds**", NO: "**contradicted**", UNTOLD: UNTOLD, MISSING: MISSING}


def judge(done: dict[Cell, Finished], plan: Plan) -> tuple[list[dict], list[str]]:
    """A record for each pair of each claim, on each dataset, and why some could not be compared."""
    pairs = {}
    records = []
    for claim, setting in product(CLAIMS, plan.settings):
        for column, pair in product(claim.columns(plan), claim.pairs(plan)):
            # Several claims may have the same pair: it is compared, and corrected for, once.
            key = (setting, column, pair)
            pairs[key] = [terms_of(pair, column, seed, plan, setting) for seed in plan.seeds]
            place = (claim.sentence, claim.where, claim.test, *column, setting)
            record = dict(zip(PLACE, place, strict=True)) | {"better": pair[0], "than": pair[1]}
            records.append((key, record))
    found, why = differences(pairs, done)
    for key, record in records:
        record["holds"] = MISSING
        if key in found:
            one, p = found[key]
            record |= asdict(one) | {"corrected": p, "holds": one.holds(p)}
            if record["test"].endswith("not worse") and one.holds(p) != NO:
                record["holds"] = YES
    return [record for _, record in records], why


def verdict(records: list[dict]) -> tuple[str, dict]:
    """What a claim's pairs say together, and the weakest pair: first of those that contradict it.

    One method that does better than all of `than` is enough for a claim of one.
    """
    sides = [records]
    if records[0]["test"].startswith("one"):
        sides = [[r for r in records if r["better"] == better] for better in names_of(records)]
    found = []
    for side in sides:
        place = min(ORDER.index(record["holds"]) for record in side)
        weakest = min(side, key=lambda r: (r["holds"] != NO, r.get("points", 101)))
        found.append((place, weakest.get("points", -101), weakest))
    place, _, weakest = max(found, key=lambda one: one[:2])
    return ORDER[place], weakest


def names_of(records):
    return dict.fromkeys(record["better"] for record in records)


def as_text(records: list[dict]) -> dict[str, list[str]]:
    """The table of claims, {heading: texts}. The records of a claim's pairs lie together."""
    rows = []
    for place, group in groupby(records, lambda record: [record[name] for name in PLACE]):
        pairs = list(group)
        holds, weakest = verdict(pairs)
        says = Counter(record["holds"] for record in pairs)
        row = {"the paper": f"'{place[0]}'", "where": place[1], "dataset": heading(*place[3:])}
        row |= {"verdict": WORDS[holds], "test": place[2]}
        row["pairs: yes, no, untold"] = f"{says[YES]}, {says[NO]}, {says[UNTOLD]}"
        row |= {"the weakest": "-", "points": "-", "seeds": "-"}
        if "points" in weakest:
            row["the weakest"] = "{better} over {than}".format(**weakest)
            row["points"] = "{points:+.2f} [{low:+.2f}, {high:+.2f}]".format(**weakest)
            row["seeds"] = str(weakest["seeds"])
        rows.append(row)
    return {head: [row[head] for row in rows] for head in rows[0]}


def notes_of(rows: dict[str, list[str]], plan: Plan, count: int) -> list[str]:
    """What a reader must know of the table that `as_text` returns.

    count: how many different pairs were compared.
    """
    counts = Counter(rows["verdict"])
    said = ", ".join(f"{counts[word]} {word}" for word in WORDS.values() if counts[word])
    notes = [
        f"Rows: {said}. A claim is made of pairs. With the test 'better' it holds where in every "
        "pair the first is better on the same test clips, and is contradicted where in one the "
        "second is (tools/evidence.py: the 95 % interval of the difference leaves out zero, and p "
        f"is below 5 % by Holm's correction for all {count} pairs that were compared here. The "
        "correction is for the "
        "clips: how seeds scatter is judged for each pair by itself, so of 20 pairs of equal "
        "methods one may be called better). 'Not worse' is parity: it "
        "holds unless the second is better, which few clips rarely show; the interval says how "
        "much worse the first may be. With 'one' it is enough that one of the first does so "
        "against all of the second.",
        "The weakest pair, with the points of accuracy between the two and the 95 % interval over "
        "clips and seeds: of a claim with 'one' that of its best method. The CSV has all pairs.",
        "Where the paper speaks of means over its datasets, each dataset is judged alone here. "
        "rr, prompts and alpha are those for 768 dimensions; a narrow backbone has other rr, "
        "prompts and learning rates (support/variants.py). With the parameters of LoRA its s = "
        "alpha / RR grows, too.",
    ]
    if plan.methods:
        notes.append(
            f"Only of {', '.join(plan.methods)} (--methods): other pairs of a claim are left out, "
            "and the correction is for fewer pairs. So with all methods verdicts may be others."
        )
    left_out = [c.sentence for c in CLAIMS if c.pairs(plan) and not c.columns(plan)]
    if left_out:
        quoted = "; ".join(f"'{sentence}'" for sentence in left_out)
        notes.append(f"Not asked of these datasets, because of others in kind: {quoted}.")
    notes += [f"Not tested: '{sentence}' ({why})." for sentence, why in NOT_TESTED.items()]
    return notes
