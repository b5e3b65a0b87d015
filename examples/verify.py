"""Let a server that has the model recompute a file of artifacts: python examples/verify.py FILE URL"""

import sys
from pathlib import Path

from gonka_poc import PoCClient, StatTest, read_artifact_file

claim = read_artifact_file(Path(sys.argv[1]))
with PoCClient(sys.argv[2]) as server:
    verdict = server.validate(claim, StatTest(dist_threshold=0.02, p_mismatch=0.001, fraud_threshold=0.01), 32)
print(f"{verdict.n_mismatch} of {verdict.n_total} differ, p = {verdict.p_value:.3g}")
sys.exit("fraud" if verdict.fraud_detected else None if verdict.n_total else "nothing was compared")
