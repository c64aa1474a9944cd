"""What the paper concludes, as tests of the runs here: does each of its claims hold?

    python -m tools.experiments claims --datasets demo --seeds 0,1,2

The claims are data, paper_claims.json. A claim is a set of pairs. It holds where in every pair the
first is better, and does not where in one of them the second is. evidence.py says when a method is
better.
"""

from dataclasses import asdict, fields
from itertools import groupby, product

from support.command import UserError
from tools.cells import CLAIMS, Cell, Plan, heading, rated, terms_of
from tools.evidence import NO, UNTOLD, YES, Difference, holm, reader


def judge(done: dict[Cell, dict], plan: Plan) -> tuple[list[dict], list[str]]:
    """A record for each pair of each claim, on each dataset, and why some could not be compared."""
    compared = reader(done, plan)
    found = []
    why = []
    for claim, setting in product(CLAIMS, plan.settings):
        for column, pair in product(claim.columns(plan), claim.pairs(plan)):
            seeds = [
                [
                    [rated(cell, setting, plan) for cell in side]
                    for side in terms_of(pair, column, seed, plan)
                ]
                for seed in plan.seeds
            ]
            try:
                one = compared(seeds)
            except UserError as error:
                one = None
                why.append(str(error))
            record = {
                "claim": claim.claim,
                "where": claim.where,
                "dataset": column[0],
                "shots": column[1],
                "setting": setting,
                "better": pair[0],
                "than": pair[1],
            }
            found.append((record, one))
    corrected = iter(holm([one.p for _, one in found if one]))
    for record, one in found:
        p = next(corrected) if one else None
        record |= asdict(one) if one else dict.fromkeys(field.name for field in fields(Difference))
        record |= {"corrected": p, "holds": one.holds(p) if one else "missing"}
    return [record for record, _ in found], why


def as_text(records: list[dict]) -> dict[str, list[str]]:
    """The table of claims, {heading: texts}. The records of a claim's pairs lie together."""
    rows = []
    for place, pairs in groupby(records, lambda record: tuple(record.values())[:5]):
        claim, where, *column = place
        pairs = list(pairs)
        verdicts = [record["holds"] for record in pairs]
        holds = [word for word in (NO, "missing", UNTOLD) if word in verdicts]
        counts = [str(verdicts.count(word)) for word in (YES, NO, UNTOLD)]
        row = {"claim": claim, "where": where, "dataset": heading(*column)}
        row["holds"] = holds[0] if holds else YES
        row["pairs: yes, no, untold"] = ", ".join(counts)
        row |= {"the weakest": "-", "points": "-", "seeds": "-"}
        compared = [record for record in pairs if record["points"] is not None]
        if compared:
            weakest = min(compared, key=lambda record: record["points"])
            row["the weakest"] = "{better} over {than}".format(**weakest)
            row["points"] = "{points:+.2f} [{low:+.2f}, {high:+.2f}]".format(**weakest)
            row["seeds"] = str(weakest["seeds"])
        rows.append(row)
    return {head: [row[head] for row in rows] for head in rows[0]}
