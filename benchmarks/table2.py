"""Memory in percent of end to end, beside the paper's Table 2, from rows of several results of ``bench memory``.

python benchmarks/table2.py RESULT.json [RESULT.json ...] --out benchmarks/results/table2.json --plot benchmarks/results/table2.png
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from wholeslide.bench.comparison import EXTRAPOLATED_IS, OURS_IS, THEIRS_IS, shares_of_end_to_end
from wholeslide.bench.picture import draw_shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--plot", required=True, type=Path)
    arguments = parser.parse_args()
    found = [json.loads(path.read_text()) for path in arguments.results]
    shares = shares_of_end_to_end([row for result in found for row in result["rows"]])
    shares.sort(key=lambda share: (share.size.area, not share.end_to_end, share.stages))
    rows = [{**asdict(share), "size": str(share.size)} for share in shares]
    content = {
        "from": [path.name for path in arguments.results],
        "notes": [OURS_IS, THEIRS_IS, EXTRAPOLATED_IS],
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    draw_shares(shares, arguments.plot)
    for row in rows:
        print(row["size"], row["label"], f"{row['of_end_to_end']:.1%}", row["paper_of_end_to_end"])


if __name__ == "__main__":
    main()
