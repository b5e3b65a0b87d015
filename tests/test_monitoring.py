"""monitoring/: promtool takes it, alerts wait as long as they say, and in a real Prometheus each fires and clears."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import FakeView, round_body
from http_receiver import Receiver
from live_server import LiveServer
from prometheus import MONITORING, dashboard_queries, prometheus, tool

from gonka_poc.answers import ReceiverStatus
from gonka_poc.callbacks.admin import purge
from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.data import PREFIX
from gonka_poc.metrics import Metrics
from gonka_poc.server.versions import installed_releases

RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
ALERTS = [rule["alert"] for rule in RULES]
DOCUMENT = MONITORING.parent / "docs" / "monitoring.md"


def promtool(*args: str | Path) -> str:
    """The output of `promtool check args`, which must find nothing."""
    run = subprocess.run([tool("promtool"), *map(str, args)], capture_output=True, text=True, cwd=MONITORING)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# --- the files ----------------------------------------------------------------------------------------------------


def test_promtool_takes_the_configuration_with_its_rules():
    assert f"{len(ALERTS)} rules found" in promtool("check", "config", "--lint=all", "--lint-fatal", "prometheus.yml")


@pytest.mark.parametrize("rule", RULES, ids=ALERTS)
def test_every_alert_is_described(rule):
    assert re.fullmatch(r"PoC[A-Z]\w+", rule["alert"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert f"`{rule['alert']}`" in DOCUMENT.read_text(encoding="utf-8")


def test_every_metric_is_in_the_document():
    """Under its name; of some, several on a line, only the end of it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    told = set(re.findall(r"`(?:gonka_poc)?(_[a-z_]+)`", text))
    names = [family.name.removeprefix("gonka_poc") for family in Metrics().collect()]
    assert len(names) > 20
    missing = [name for name in names if not any(name.endswith(end.removesuffix("_total")) for end in told)]
    assert missing == []


def test_the_labels_in_the_document_are_those_of_a_scrape():
    """Each metric in a row has the labels of that row. What several names begin with stands in their row once."""
    metrics = Metrics()
    counts = dict.fromkeys(("waiting", "delivered", "refused", "parked", "expired"), 1)
    metrics.receivers = lambda: [ReceiverStatus(receiver="r", oldest_sec=1.0, **counts)]
    metrics.build = installed_releases
    metrics.replay_refused(500)
    scraped: dict[str, set[str]] = {}
    for family in metrics.collect():
        for sample in family.samples:
            scraped.setdefault(family.name, set()).update(set(sample.labels) - {"le"})
    rows = re.findall(r"^\| (`gonka_poc_.*?) \|([\w, ]*)\|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    told: dict[str, set[str]] = {}
    for names, labels in rows:
        full, *ends = (name.removesuffix("_total") for name in re.findall(r"`(\w+)`", names))
        for name in (full, *ends):
            told[full.rpartition("_")[0] + name if name[0] == "_" else name] = set(re.findall(r"\w+", labels))
    assert told == scraped


def test_the_document_shows_the_lines_that_the_configuration_has():
    """But for the name of the file with the alerts, which stands among others there."""
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)[0])
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    assert shown["scrape_configs"] == config["scrape_configs"]
    assert f"/etc/prometheus/{shown['rule_files'][0]}" in DOCUMENT.read_text(encoding="utf-8")


def test_a_single_figure_is_that_of_now():
    """A stat panel over a range would show the last value of a host that is gone, or of a state that ended."""
    board = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
    stats = [target for panel in board["panels"] if panel["type"] == "stat" for target in panel["targets"]]
    assert [(target["instant"], target["range"]) for target in stats] == [(True, False)] * 4


def test_rates_are_over_as_many_scrapes_as_they_need():
    """A minute holds a single scrape at the pace that Prometheus has by itself; Grafana knows the pace."""
    queries = (MONITORING / "grafana.json").read_text(encoding="utf-8")
    assert "[$__rate_interval]" in queries
    assert "[1m]" not in queries


def test_the_dashboard_asks_for_the_host_that_is_chosen():
    board = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
    selectors = [
        re.findall(r"gonka_poc_\w+(\{[^}]*\})?", target["expr"]) for p in board["panels"] for target in p["targets"]
    ]
    assert {selector for found in selectors for selector in found} == {'{instance=~"$instance"}'}
    boxes = [tuple(panel["gridPos"][side] for side in "xywh") for panel in board["panels"]]
    assert all(x + w <= 24 for x, _, w, _ in boxes)
    cells = [(x + i, y + j) for x, y, w, h in boxes for i in range(w) for j in range(h)]
    assert len(cells) == len(set(cells))  # no panel lies on another


# --- when they fire, by the clock of promtool ----------------------------------------------------------------------

HERE = 'job="gonka_poc", instance="host"'
# series over time, a value each minute, and the first and last minute in which the alert fires
TIMES: dict[str, tuple[dict[str, str], int, int]] = {
    "PoCServerDown": ({f"up{{{HERE}}}": "1x3 0x5 1x20"}, 6, 9),
    "PoCReceiverDoesNotTake": (
        {
            f'gonka_poc_callbacks_waiting{{{HERE}, receiver="r"}}': "5x30",
            f'gonka_poc_callbacks_oldest_seconds{{{HERE}, receiver="r"}}': "0 60 120 180 240 2x30",
        },
        *(3, 4),
    ),
    # no nonces from minute 5 on; from minute 20 on it is because of chat
    "PoCRoundStandsStill": (
        {
            f'gonka_poc_state{{{HERE}, state="GENERATING"}}': "1x40",
            f"gonka_poc_nonces_total{{{HERE}}}": "0+100x5 500x40",
            f'gonka_poc_skipped_total{{{HERE}, reason="chat"}}': "0x20 1+1x40",
        },
        *(8, 20),
    ),
    "PoCNaN": ({f"gonka_poc_nan_total{{{HERE}}}": "0x5 3x40"}, 6, 20),
    "PoCProofsRefused": (
        {
            f'gonka_poc_callbacks_total{{{HERE}, outcome="park"}}': "0x5 1x40",
            f"gonka_poc_outbox_parked{{{HERE}}}": "0x5 9x20 0x30",
        },
        *(6, 26),
    ),
    "PoCProofsExpired": ({f'gonka_poc_callbacks_expired_total{{{HERE}, receiver="r"}}': "0x5 9x40"}, 6, 20),
    # ten batches a minute, each of 1 s, and from minute 120 to 130 of 4 s
    "PoCSlowBatches": (
        {
            f"gonka_poc_batch_seconds_sum{{{HERE}}}": "0+10x120 1240+40x9 1610+10x40",
            f"gonka_poc_batch_seconds_count{{{HERE}}}": "0+10x170",
        },
        *(129, 135),
    ),
    "PoCOutboxOverHalf": (
        {f"gonka_poc_outbox_bytes{{{HERE}}}": "50x5 51x5 50x20", f"gonka_poc_outbox_max_bytes{{{HERE}}}": "100x40"},
        *(7, 11),
    ),
}


# what `$value` is in the annotations, in the first minute in which an alert with it fires
VALUES = {
    "PoCReceiverDoesNotTake": "3m 0s",
    "PoCNaN": "3",
    "PoCProofsExpired": "9",
    "PoCSlowBatches": "3.7s",
    "PoCOutboxOverHalf": "51",
}
MORE_LABELS = {"PoCReceiverDoesNotTake": {"receiver": "r"}, "PoCRoundStandsStill": {"state": "GENERATING"}}


def test_every_alert_has_its_times():
    assert list(TIMES) == ALERTS
    assert [rule["alert"] for rule in RULES if "$value" in str(rule["annotations"])] == list(VALUES)


def expected_alert(rule: dict[str, Any]) -> dict[str, Any]:
    """An alert of `rule` with its labels, and its annotations as an operator reads them."""
    labels = {"job": "gonka_poc", "instance": "host", **MORE_LABELS.get(rule["alert"], {})}
    texts = {f"{{{{ $labels.{name} }}}}": value for name, value in labels.items()}
    annotations = {}
    for name, text in rule["annotations"].items():
        for shown, value in texts.items():
            text = text.replace(shown, value)
        annotations[name] = re.sub(r"\{\{ \$value[^}]*\}\}", VALUES.get(rule["alert"], ""), text)
    return {"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": annotations}


def test_alerts_wait_as_long_as_they_say(tmp_path):
    """Of a table of series: in the first and the last minute an alert fires, and in none before and after. In the
    first it says what is so."""
    groups = []
    for rule in RULES:
        series, first, last = TIMES[rule["alert"]]
        query = f'count(ALERTS{{alertname="{rule["alert"]}", alertstate="firing"}})'
        checks: list[dict[str, Any]] = []
        for minute in (first - 1, first, last, last + 1):
            fires = [{"labels": "{}", "value": 1}] if first <= minute <= last else []
            checks.append({"eval_time": f"{minute}m", "expr": query, "exp_samples": fires})
        says = {"eval_time": f"{first}m", "alertname": rule["alert"], "exp_alerts": [expected_alert(rule)]}
        lines = [{"series": name, "values": values} for name, values in series.items()]
        groups.append({"interval": "1m", "input_series": lines, "promql_expr_test": checks, "alert_rule_test": [says]})
    test = {"rule_files": [str(MONITORING / "alerts.yml")], "evaluation_interval": "1m", "tests": groups}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", tmp_path / "test.yml")


# --- in a real Prometheus ------------------------------------------------------------------------------------------


class Engine(FakeView):
    """An engine some of whose values are NaN while `breaks` is set."""

    breaks = False

    def _answer(self, method: str, *args: Any) -> dict[str, Any] | None:
        answer = super()._answer(method, *args)
        if method == "poc_compute" and self.breaks and answer is not None:
            answer["finite"][0] = False
        return answer


def processed(server: LiveServer) -> int:
    """The nonces of the round so far."""
    return int(server.get(f"{PREFIX}/status").json()["stats"]["total_processed"])


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def test_each_alert_fires_and_clears_and_every_query_finds_series(tmp_path, monkeypatch, receiver):
    file = str(tmp_path / "outbox")
    for name, value in {"OUTBOX_PATH": file, "OUTBOX_MAX_BYTES": "262144", "CALLBACK_INTERVAL_SEC": "0.2"}.items():
        monkeypatch.setenv(f"POC_{name}", value)
    before = Outbox(file, 2**20, clock=lambda: time.time() - 120)  # a server that ended two minutes ago
    before.add_artifacts(receiver.url, {"block_height": 7}, [{"nonce": 1, "vector_b64": "AAAA"}])
    before.close()
    engine = Engine()
    engine.asleep = True
    server = LiveServer(view=engine)
    body = round_body(url=receiver.url, params={"model": "tiny", "seq_len": 4, "k_dim": 16})
    with prometheus(tmp_path, f"127.0.0.1:{server.port}") as prom:
        prom.until_firing("PoCServerDown")
        with server:
            prom.until_clear("PoCServerDown")
            prom.until_firing("PoCReceiverDoesNotTake")
            engine.asleep = False
            server.post("/init/generate", body).raise_for_status()
            prom.until(lambda: processed(server) >= 200, "there is nothing to compare slow batches with")
            prom.until_clear("PoCRoundStandsStill")
            engine.asleep = True
            prom.until_firing("PoCRoundStandsStill")

            engine.breaks, engine.call_sec, engine.asleep = True, 2.1, False
            prom.until_firing("PoCNaN", "PoCSlowBatches")
            prom.until_clear("PoCRoundStandsStill")
            engine.breaks, engine.call_sec = False, 0.001
            prom.until_firing("PoCOutboxOverHalf")

            server.post("/stop").raise_for_status()
            receiver.refuses_next = True
            prom.until_firing("PoCProofsRefused")
            assert purge(file) == 1
            later = body | {"block_height": 8, "block_hash": "later"}
            server.post("/init/generate", later).raise_for_status()
            prom.until_firing("PoCProofsExpired")
            missing = [query for query in dashboard_queries() if not prom.ask("/query", query=query[1])["result"]]
            assert missing == []
            assert prom.firing() <= set(ALERTS)

            receiver.status = 200
            prom.until_clear(*ALERTS)
            groups = prom.ask("/rules")["groups"]
            assert [rule["name"] for rule in groups[0]["rules"]] == ALERTS
            assert {rule["health"] for rule in groups[0]["rules"]} == {"ok"}
