"""What the paper concludes, as tests of the runs here: does each of its claims hold?

    python -m tools.experiments claims --datasets demo --seeds 0,1,2

The claims are data, paper_claims.json. A claim is a set of pairs. It holds where in every pair the
first is better, and does not where in one of them the second is. evidence.py says when a method is
better.
"""

from dataclasses import asdict
from itertools import groupby, product

from tools.cells import CLAIMS, Cell, Plan, heading, terms_of
from tools.evidence import NO, UNTOLD, YES, differences

PLACE = ("claim", "where", "dataset", "shots", "setting")


def judge(done: dict[Cell, dict], plan: Plan) -> tuple[list[dict], list[str]]:
    """A record for each pair of each claim, on each dataset, and why some could not be compared."""
    pairs = {}
    records = {}
    for claim, setting in product(CLAIMS, plan.settings):
        for column, pair in product(claim.columns(plan), claim.pairs(plan)):
            key = (claim.claim, setting, column, pair)
            pairs[key] = [terms_of(pair, column, seed, plan, setting) for seed in plan.seeds]
            place = dict(zip(PLACE, (claim.claim, claim.where, *column, setting), strict=True))
            records[key] = place | {"better": pair[0], "than": pair[1], "holds": "missing"}
    found, why = differences(pairs, done, plan)
    for key, (one, p) in found.items():
        records[key] |= asdict(one) | {"corrected": p, "holds": one.holds(p)}
    return list(records.values()), why


def as_text(records: list[dict]) -> dict[str, list[str]]:
    """The table of claims, {heading: texts}. The records of a claim's pairs lie together."""
    rows = []
    for place, group in groupby(records, lambda record: [record[name] for name in PLACE]):
        pairs = list(group)
        verdicts = [record["holds"] for record in pairs]
        holds = [word for word in (NO, "missing", UNTOLD, YES) if word in verdicts]
        row = {"claim": place[0], "where": place[1], "dataset": heading(*place[2:])}
        row["holds"] = holds[0]
        row["pairs: yes, no, untold"] = ", ".join(
            str(verdicts.count(word)) for word in (YES, NO, UNTOLD)
        )
        row |= {"the weakest": "-", "points": "-", "seeds": "-"}
        compared = [record for record in pairs if "points" in record]
        if compared:
            weakest = min(compared, key=lambda record: record["points"])
            row["the weakest"] = "{better} over {than}".format(**weakest)
            row["points"] = "{points:+.2f} [{low:+.2f}, {high:+.2f}]".format(**weakest)
            row["seeds"] = str(weakest["seeds"])
        rows.append(row)
    return {head: [row[head] for row in rows] for head in rows[0]}
