"""Outbox files that lose bits, pages or the end of a log: what is whole is delivered, and nothing wrong or short."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import shutil
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from fakes import FakeManager, make_poc, round_body, until
from test_callbacks import SimulatedTime

from gonka_poc.callbacks import client as callback_client
from gonka_poc.callbacks import locks
from gonka_poc.callbacks.admin import retry_parked, summary
from gonka_poc.callbacks.outbox import Outbox, RoundCheckpoint
from gonka_poc.callbacks.salvage import MAX_SET_ASIDE
from gonka_poc.callbacks.schema import APPLICATION_ID, SCHEMA
from gonka_poc.callbacks.sender import CallbackSender
from gonka_poc.config import Settings
from gonka_poc.errors import OutboxDamagedError, OutboxFullError
from gonka_poc.preflight import check_settings

URLS = ("http://a", "http://b", "http://c")
CAP = 10**9
SEEDS = int(os.environ.get("POC_TEST_DAMAGES", "500"))


def vector(nonce: int) -> str:
    return base64.b64encode(random.Random(nonce).randbytes(24)).decode()


def artifacts(*nonces: int) -> list[dict]:
    return [{"nonce": nonce, "vector_b64": vector(nonce)} for nonce in nonces]


def is_right(body: dict) -> bool:
    """A batch of `filled`: whole, and with its own vectors."""
    if "verdict" in body:
        return body == {"block_height": 7, "verdict": body["verdict"], "n_total": 5}
    nonces = [artifact["nonce"] for artifact in body["artifacts"]]
    return body["artifacts"] == artifacts(*nonces) and nonces == list(range(nonces[0], nonces[0] + 20))


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A folder with the files of a server that was killed: three receivers, batches in the file and in the log."""
    folder = tmp_path_factory.mktemp("filled")
    box = Outbox(str(folder / "outbox"), CAP)
    for number in range(24):
        nonces = range(20 * number, 20 * number + 20)
        box.add_artifacts(URLS[number % 3], {"block_height": 7, "number": number}, artifacts(*nonces))
        if number == 15:
            box.add_validated(URLS[0], {"block_height": 7, "verdict": number, "n_total": 5})
            box._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    left = tmp_path_factory.mktemp("left")
    for file in folder.iterdir():
        if not file.name.endswith("-shm"):
            shutil.copy(file, left)
    box.close()
    return left


def damage(folder: Path, rng: random.Random) -> str:
    """Damage the files in one of the ways that disks and copies have."""
    kind = rng.choice(["flips", "flips", "flips", "torn page", "torn copy", "log cut", "log flipped"])
    file = folder / ("outbox-wal" if kind.startswith("log") else "outbox")
    content = bytearray(file.read_bytes())
    if kind == "torn page":
        at = 4096 * rng.randrange(len(content) // 4096)
        content[at : at + 4096] = bytes(4096) if rng.random() < 0.5 else rng.randbytes(4096)
    elif kind in ("torn copy", "log cut"):
        del content[rng.randrange(len(content)) :]
    else:
        for _ in range(rng.choice([1, 2, 8, 64])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return kind


@pytest.fixture
def receivers(monkeypatch):
    """All bodies that were posted, by host."""
    got: dict[str, list[dict]] = defaultdict(list)
    real = httpx.AsyncClient

    def answer(request: httpx.Request) -> httpx.Response:
        got[request.url.host].append(json.loads(request.content))
        return httpx.Response(200)

    def client(**options):
        return real(**{**options, "transport": httpx.MockTransport(answer)})

    monkeypatch.setattr(callback_client.httpx, "AsyncClient", client)
    return got


async def deliver_damaged(path: Path, got: dict[str, list[dict]]) -> Counter[str]:
    """Let a server deliver for a minute what the damaged file holds, and then new work for each receiver."""
    got.clear()
    clock = SimulatedTime()
    outbox = Outbox(str(path), CAP, must_open=False)  # chat starts, whatever there is
    sender = CallbackSender(Settings(), outbox, clock=lambda: clock.now, sleep=clock.sleep)
    result = Counter[str]()
    try:
        sender.start()
        await clock.run(60, sender)
        old = [body for bodies in got.values() for body in bodies]
        assert all(map(is_right, old)), "nothing wrong, nothing short"
        assert len(old) <= 2 * 25, "no loop without a pause"
        assert not [key for key, count in Counter(map(json.dumps, old)).items() if count > 1]
        for number, url in enumerate(URLS):
            await sender.add_artifacts(url, {"block_height": 7, "new": number}, artifacts(*range(1000, 1020)))
        await clock.run(30, sender)
        for number, url in enumerate(URLS):
            new = [body for body in got[url.removeprefix("http://")] if "new" in body]
            assert [body["new"] for body in new] == [number], "every receiver is served"
        result = Counter(delivered=len(old), damaged=outbox.damaged_batches, aside=bool(list_aside(path)))
        result["silent"] = 25 - len(old) - outbox.damaged_batches if not path.name.startswith("log") else 0
    finally:
        await sender.close()
    return result


def list_aside(path: Path) -> list[Path]:
    return [file for file in path.parent.iterdir() if re.fullmatch(r"outbox\.damaged-\d", file.name)]


async def over_seeds(seeds: range, filled: Path, tmp_path: Path, got: dict[str, list[dict]]) -> None:
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in seeds:
        folder = tmp_path / str(seed)
        shutil.copytree(filled, folder)
        kind = damage(folder, random.Random(seed))
        try:
            result = await deliver_damaged(folder / "outbox", got)
        except BaseException:
            print(f"seed {seed}: {kind}")
            raise
        if not kind.startswith("log"):  # a log that ends early is a server that was killed earlier
            assert result["silent"] <= 0 or result["damaged"] > 0, (seed, kind, result)
        totals[kind].update(result, files=1)
        shutil.rmtree(folder)
    for kind, total in sorted(totals.items()):
        print(f"{kind}: {dict(total)}")


async def test_seeded_damages(filled, tmp_path, receivers):
    await over_seeds(range(40), filled, tmp_path, receivers)


@pytest.mark.nightly
async def test_many_seeded_damages(filled, tmp_path, receivers):
    await over_seeds(range(40, 40 + SEEDS), filled, tmp_path, receivers)


# --- one batch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "outbox")


@pytest.fixture
def box(path):
    box = Outbox(path, CAP)
    for number in range(3):
        box.add_artifacts(URLS[0], {"number": number}, artifacts(*range(20 * number, 20 * number + 20)))
    yield box
    box.close()


def sent(box: Outbox) -> list[int]:
    """The first nonces of the batches that are delivered."""
    first = []
    while (newest := box.newest(URLS[0])) is not None and (batch := box.next_batch(URLS[0], newest)) is not None:
        first.append(json.loads(batch.body)["artifacts"][0]["nonce"])
        box.mark_delivered(batch.id)
    return first


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE artifact SET value = CAST(x'c141' AS TEXT) WHERE nonce = 25", "do not fit their digest"),
        ("UPDATE artifact SET nonce = 26 WHERE nonce = 25", "do not fit their digest"),
        ("UPDATE artifact SET value = 'A' || substr(value, 2) WHERE batch_id = 2", "do not fit their digest"),
        ("DELETE FROM artifact WHERE nonce BETWEEN 25 AND 39", "it has 5 artifacts of 20"),
        ("DELETE FROM artifact WHERE batch_id = 2", "it has 0 artifacts of 20"),
        ("UPDATE batch SET payload = '{\"number\":4}' WHERE id = 2", "its envelope does not fit"),
        ("UPDATE batch SET key = 'other' WHERE id = 2", "its envelope does not fit"),
    ],
    ids=["no UTF-8", "a nonce", "vectors", "rows are gone", "all rows are gone", "envelope", "key"],
)
def test_a_batch_that_is_not_what_was_stored_is_parked_and_the_rest_goes_on(box, path, statement, said):
    box._db.execute(statement)
    assert sent(box) == [0, 40]
    (left,) = summary(path)
    assert left.status == "parked"
    assert said in left.reason
    assert box.damaged_batches == 1
    assert said in box.damage
    retry_parked(path)
    assert sent(box) == []


def test_a_batch_for_nobody_is_found_at_the_start(box, path):
    box._db.execute("UPDATE batch SET url = 'http://x' WHERE id = 2")
    box._db.execute("PRAGMA ignore_check_constraints = ON")
    box._db.execute("UPDATE batch SET status = 'penxing' WHERE id = 3")
    box.close()
    with closing(Outbox(path, CAP)) as other:
        assert sent(other) == [0]
        assert other.damaged_batches == 2


def test_a_round_whose_progress_grew_begins_anew(box):
    checkpoint = box.begin_round(URLS[0], "print")
    box.add_artifacts(URLS[0], {}, artifacts(0), RoundCheckpoint(checkpoint.round_id, 1))
    assert box.begin_round(URLS[0], "print").done == 1
    box._db.execute("UPDATE round SET done = 4097")
    assert box.begin_round(URLS[0], "print").done == 0


async def test_damage_is_shown(box, path, receivers):
    box._db.execute("DELETE FROM artifact WHERE nonce = 25")
    box.close()
    service = make_poc(FakeManager(), Settings(outbox_path=path, callback_interval_sec=0.001)).service
    service.callbacks.start()
    await until(lambda: len(receivers["a"]) == 2)
    error = service.status().error
    assert re.search("1 callbacks in the outbox were damaged; the last: callback 2: damaged: it has 19 .* 20", error)
    (family,) = [m for m in service.metrics.collect() if m.name == "gonka_poc_outbox_damaged_batches"]
    assert family.samples[0].value == 1
    await service.close()


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_changed_is_replaced_by_what_is_whole(box, path):
    """An answer that cannot be recorded would bring the same batch again and again."""
    box._db.execute("CREATE TRIGGER broken BEFORE DELETE ON batch BEGIN SELECT RAISE(ABORT, 'FOREIGN KEY'); END")
    batch = box.next_batch(URLS[0], box.newest(URLS[0]))
    with pytest.raises(OutboxDamagedError, match="FOREIGN KEY") as raised:
        box.mark_delivered(batch.id)
    box.recover(str(raised.value))
    box.mark_delivered(batch.id)
    assert sent(box) == [20, 40]
    assert Path(f"{path}.damaged-1").exists()
    box.add_artifacts(URLS[0], {}, artifacts(60))
    assert summary(path)[0].id > 1000, "no id of a batch that nobody could read"


def test_only_so_many_files_are_set_aside(box, path):
    for number in range(MAX_SET_ASIDE):
        Path(f"{path}.damaged-{number + 1}").touch()
    with pytest.raises(OutboxDamagedError, match="look at the disk"):
        box.recover("damaged")
    assert sent(box) == [0, 20, 40]


@pytest.mark.parametrize("change", ["removed", "log removed", "exchanged"])
async def test_a_file_that_vanished_is_noticed_and_nothing_more_is_stored(path, receivers, change, monkeypatch):
    clock = SimulatedTime()
    sender = CallbackSender(Settings(), Outbox(path, CAP), clock=lambda: clock.now, sleep=clock.sleep)
    sender.start()
    await clock.run(1, sender)
    gone = path + ("-wal" if change == "log removed" else "")
    os.rename(gone, f"{path}.kept")
    if change == "exchanged":
        shutil.copy(f"{path}.kept", path)
    await clock.run(6, sender)
    assert "removed or exchanged" in sender.problem
    with pytest.raises(OutboxFullError, match="put it back"):
        await sender.check_room(URLS[0])
    os.replace(f"{path}.kept", gone)
    await clock.run(6, sender)
    assert sender.problem is None
    await sender.check_room(URLS[0])
    await sender.close()


async def test_chat_starts_with_an_outbox_that_nobody_can_repair(path, capsys, monkeypatch):
    """Callbacks are refused with the reason, rounds without a receiver run, and `serve` says so before the start."""
    Outbox(path, CAP).close()
    other = Outbox(path, CAP)
    Path(path).write_bytes(b"SQLite format 3\0" + bytes(8176))
    monkeypatch.setenv("POC_OUTBOX_PATH", path)
    check_settings(print)
    assert re.search("is damaged.*Chat is served all the same", capsys.readouterr().out)
    app = make_poc(FakeManager(), Settings(outbox_path=path))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app.http), base_url="http://test") as client:
        refused = await client.post("/api/v1/pow/init/generate", json=round_body(url=URLS[0]))
        assert refused.status_code == 507
        assert "is damaged" in refused.json()["detail"]
        assert (await client.post("/api/v1/pow/init/generate", json=round_body())).status_code == 200
        assert "is damaged" in (await client.get("/api/v1/pow/status")).json()["error"]
    await app.close()
    other.close()


# --- the last release's file ----------------------------------------------------------------------------------------


def make_last_releases_file(path: str) -> None:
    """With batches in it, as that release made them."""
    schema = SCHEMA.replace("    updated_at REAL NOT NULL,\n    digest BLOB\n", "    updated_at REAL NOT NULL\n")
    schema = re.sub(r"tried_at REAL,\n[^)]*BLOB\n\)", "tried_at REAL\n)", schema)
    assert "BLOB" not in schema
    with closing(sqlite3.connect(path)) as db:
        pragmas = (
            f"PRAGMA auto_vacuum = INCREMENTAL; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 2;"
        )
        db.executescript(pragmas + schema)
        db.execute("INSERT INTO round (fingerprint, slot, done, updated_at) VALUES ('print', 0, 60, 1.0)")
        fields = "slot, round_id, url, path, payload, key, status, num_artifacts, created_at"
        for number in range(3):
            values = (0, 1, URLS[0], "generated", "{}", f"key {number}", "open" if number == 2 else "pending", 20, 1.0)
            db.execute(f"INSERT INTO batch ({fields}) VALUES ({', '.join('?' * len(values))})", values)
            rows = [(number + 1, i, 20 * number + i, vector(20 * number + i)) for i in range(20)]
            db.executemany("INSERT INTO artifact VALUES (?, ?, ?, ?)", rows)
        db.commit()
        db.execute("PRAGMA journal_mode = WAL")


def test_the_last_releases_file_keeps_its_batches(path):
    make_last_releases_file(path)
    assert len(summary(path)) == 3
    with closing(Outbox(path, CAP)) as other:
        round_id = other.begin_round(URLS[0], "print").round_id
        assert other.begin_round(URLS[0], "print").done == 60
        other.add_artifacts(URLS[0], {}, artifacts(60), RoundCheckpoint(round_id, 61))
        assert other.begin_round(URLS[0], "print").done == 61
        other._db.execute("DELETE FROM artifact WHERE nonce = 25")
        assert sent(other) == [0, 40, 60]
        assert other.damaged_batches == 1


# --- modes, locks, FIFOs --------------------------------------------------------------------------------------------


def test_files_that_others_could_read_are_closed_to_them(path, caplog):
    Path(path).touch()
    os.chmod(path, 0o666)
    before = os.umask(0)
    try:
        box = Outbox(path, CAP)
        deep = Outbox(str(Path(path).parent / "x" / "y" / "outbox"), CAP)
    finally:
        os.umask(before)
    for name in (path, f"{path}-wal", f"{path}-shm", f"{path}.lock-open", f"{path}.lock-0"):
        assert os.stat(name).st_mode & 0o777 == 0o600, name
    assert os.stat(Path(deep.path).parent.parent).st_mode & 0o777 == 0o700
    assert "was open to other users (mode 666)" in caplog.text
    box.close()
    deep.close()


def test_a_lock_that_is_held_is_waited_for_with_an_end_and_its_holder_named(path, monkeypatch):
    Outbox(path, CAP).close()
    monkeypatch.setattr("gonka_poc.callbacks.file.OPEN_TIMEOUT_SEC", 0.1)
    started = time.monotonic()
    with locks.locked(f"{path}.lock-open", 0):
        with pytest.raises(OutboxFullError, match=f"held for 0.1 s by process {os.getpid()} "):
            summary(path)
    assert time.monotonic() - started < 5
    assert summary(path) == []


@pytest.mark.parametrize("name", ["outbox", "outbox.lock-open"])
def test_a_fifo_is_refused_and_not_waited_for(path, name):
    os.mkfifo(Path(path).parent / name)
    said: list[str] = []

    def use() -> None:
        with suppress(OutboxFullError):
            try:
                Outbox(path, CAP)
            except Exception as error:
                said.append(str(error))

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert "is no plain file" in said[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="for root alone")
def test_roots_lock_belongs_to_the_owner_of_the_file(path):
    Outbox(path, CAP).close()
    os.unlink(f"{path}.lock-open")
    os.chown(path, 65534, 65534)
    Outbox(path, CAP).close()
    assert os.stat(f"{path}.lock-open").st_uid == 65534


async def test_nothing_is_left_to_run(path):
    """A server whose outbox is damaged and shared closes as quickly as any."""
    one, two = Outbox(path, CAP), Outbox(path, CAP)
    one._db.execute("DROP TABLE batch")
    sender = CallbackSender(Settings(), two)
    sender.start()
    await asyncio.sleep(0.05)
    await asyncio.wait_for(sender.close(), 5)
    one.close()
