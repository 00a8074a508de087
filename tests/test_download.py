"""Downloads of checkpoints, against a local server that breaks off, refuses and changes files."""

import http.server
import logging
import os
import re
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from glide_text2im import download, transfer
from glide_text2im.download import DownloadError, fetch_file_cached, load_checkpoint

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
HALF = len(CONTENT) // 2 // 4096 * 4096  # whole chunks, so that none of it is lost


class Server(http.server.ThreadingHTTPServer):
    """Serves one file at every path; the attributes say how, `ranges` holds what was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.headers = {"ETag": '"one"'}  # of every good answer
        self.break_offs = []  # bytes after which the next answers end early
        self.statuses = []  # of the next answers, instead of the file
        self.supports_ranges = True
        self.says_length = True
        self.honours_if_range = True
        self.delay = 0.0  # seconds before an answer
        self.ranges = []

    def handle_error(self, *_):
        pass  # a client that stops listening is part of the tests

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/files/base.pt"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        threading.Event().wait(server.delay)
        if server.statuses:
            self.send_response(server.statuses.pop(0))
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"error")
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        changed = server.honours_if_range and (
            self.headers.get("If-Range") not in server.headers.values()
        )
        if not server.supports_ranges or changed:
            start = 0
        body, size = server.content[start:], len(server.content)
        if start >= size:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: server.break_offs.pop(0)] if server.break_offs else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(transfer, "_RETRY_DELAYS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(transfer, "_TIMEOUTS", (5.0, 5.0))


def fetch(server, folder):
    return fetch_file_cached(server.url, progress=False, cache_dir=folder)


def fetch_what_breaks_off(server, folder, n_bytes):
    """Leaves `n_bytes` of the file in the folder, as a process does that was stopped."""
    server.break_offs = [n_bytes, 0, 0, 0]
    with pytest.raises(DownloadError):
        fetch(server, folder)
    server.ranges.clear()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_downloaded_once_and_then_found(server, tmp_path):
    folder = tmp_path / "new" / "cache"
    path = fetch(server, folder)
    assert path == folder / "base.pt"
    assert path.read_bytes() == CONTENT
    assert fetch(server, folder) == path
    assert server.ranges == [None]
    assert names(folder) == ["base.pt"]


def test_a_broken_connection_is_taken_up_again_where_it_broke_off(server, tmp_path):
    server.break_offs = [4096, 8192]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=4096-", "bytes=12288-"]
    assert names(tmp_path) == ["base.pt"]


def test_attempts_are_not_counted_as_long_as_bytes_arrive(server, tmp_path):
    server.break_offs = [4096] * 20
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 21


def test_a_file_that_has_changed_is_given_as_many_attempts_as_any(server, tmp_path):
    fetch_what_breaks_off(server, tmp_path, HALF)
    server.headers = {"ETag": '"two"'}
    server.break_offs = [4096] * 10  # all of them before the place where the old one broke off
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_the_next_call_continues_a_download_that_was_given_up(server, tmp_path):
    fetch_what_breaks_off(server, tmp_path, HALF)
    assert names(tmp_path) == ["base.pt.part", "base.pt.part.json"]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF}-"]


def test_a_date_does_where_the_server_has_no_etag(server, tmp_path):
    server.headers = {"ETag": 'W/"one"', "Last-Modified": "Fri, 24 Dec 2021 10:00:00 GMT"}
    fetch_what_breaks_off(server, tmp_path, HALF)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF}-"]


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("size", [len(CONTENT), HALF - 1, len(CONTENT) + 7])
def test_a_file_that_has_changed_is_not_mixed_with_the_old_one(
    server, tmp_path, size, honours_if_range
):
    fetch_what_breaks_off(server, tmp_path, HALF)
    server.content = bytes(reversed(CONTENT + CONTENT))[:size]
    server.headers = {"ETag": '"two"'}
    server.honours_if_range = honours_if_range
    assert fetch(server, tmp_path).read_bytes() == server.content


def test_another_url_of_the_same_file_name_starts_from_the_beginning(server, tmp_path):
    fetch_what_breaks_off(server, tmp_path, HALF)
    other = server.url.replace("/files/", "/others/")
    fetch_file_cached(other, progress=False, cache_dir=tmp_path)
    assert server.ranges == [None]


@pytest.mark.parametrize("headers", [{}, {"ETag": '"one"'}], ids=["unknown version", "no ranges"])
def test_a_server_that_cannot_continue_sends_the_whole_file_again(server, tmp_path, headers):
    server.headers = headers
    server.supports_ranges = False
    server.break_offs = [4096]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_a_download_stopped_just_before_its_end_needs_no_network(server, tmp_path):
    fetch_what_breaks_off(server, tmp_path, HALF)
    (tmp_path / "base.pt.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == []


def test_an_unreadable_note_about_the_partial_file_only_costs_the_restart(server, tmp_path):
    fetch_what_breaks_off(server, tmp_path, HALF)
    (tmp_path / "base.pt.part.json").write_text("{")
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_server_in_trouble_is_asked_again(server, tmp_path):
    server.statuses = [503, 500]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 3


def test_a_server_that_keeps_failing_is_given_up(server, tmp_path):
    server.statuses = [500] * 10
    with pytest.raises(DownloadError, match="the server answered 500"):
        fetch(server, tmp_path)
    assert len(server.ranges) == 4
    assert names(tmp_path) == []


def test_a_missing_file_is_reported_at_once_and_no_error_page_is_kept(server, tmp_path):
    server.statuses = [404]
    with pytest.raises(DownloadError, match="the server answered 404 Not Found"):
        fetch(server, tmp_path)
    assert server.ranges == [None]
    assert names(tmp_path) == []


def test_a_login_page_instead_of_the_file_is_not_kept(server, tmp_path):
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(DownloadError, match="a web page instead of the file"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []


def test_a_file_of_unstated_length_is_taken_as_it_comes(server, tmp_path):
    server.says_length = False
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_stops_talking_does_not_hang_the_caller(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_TIMEOUTS", (5.0, 0.1))
    server.delay = 0.5
    with pytest.raises(DownloadError, match="timed out"):
        fetch(server, tmp_path)


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    with Server() as closed:
        url = closed.url
    with pytest.raises(DownloadError) as raised:
        fetch_file_cached(url, progress=False, cache_dir=tmp_path)
    message = str(raised.value)
    for part in (url, "refused", f"Put the file into {tmp_path} as base.pt"):
        assert part in message
    for part in ("\n", "--", "GLIDE_CACHE_DIR"):  # flags are those of programs
        assert part not in message


def test_without_a_network_the_variable_for_the_folder_is_named_where_it_counts(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("GLIDE_CACHE_DIR", str(tmp_path))
    with Server() as closed:
        url = closed.url
    with pytest.raises(DownloadError, match="pt, or into a folder that GLIDE_CACHE_DIR"):
        fetch_file_cached(url, progress=False)


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=re.escape(str(tmp_path / "file"))):
        fetch(server, tmp_path / "file")


def test_every_retry_is_announced(server, tmp_path, caplog):
    server.break_offs = [4096]
    with caplog.at_level(logging.WARNING):
        fetch(server, tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "trying again" in caplog.text


def test_the_progress_bar_counts_from_what_was_there_already(server, tmp_path, capsys):
    fetch_what_breaks_off(server, tmp_path, HALF)
    fetch_file_cached(server.url, cache_dir=tmp_path)
    bar = capsys.readouterr().err
    assert "base.pt:  48%" in bar
    assert "base.pt: 100%" in bar


def test_two_processes_that_start_together_download_once(server, tmp_path):
    server.delay = 1.0
    with get_context("spawn").Pool(2) as pool:
        results = [
            pool.apply_async(fetch_file_cached, (server.url, False, tmp_path)) for _ in range(2)
        ]
        paths = [result.get(timeout=60) for result in results]
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]
    assert server.ranges == [None]


# ---------------------------------------------------------------------- where files are kept


def test_an_existing_model_cache_in_the_working_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIDE_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert download.default_cache_dir() != tmp_path / "glide_model_cache"
    (tmp_path / "glide_model_cache").mkdir()
    assert download.default_cache_dir() == tmp_path / "glide_model_cache"


def test_the_environment_decides_about_the_cache_folder(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glide_model_cache").mkdir()
    monkeypatch.setenv("GLIDE_CACHE_DIR", str(tmp_path / "mine"))
    assert fetch_file_cached(server.url, progress=False) == tmp_path / "mine" / "base.pt"


# ------------------------------------------------------------------------ reading checkpoints


@pytest.fixture
def weights(tmp_path):
    torch.save({"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, tmp_path / "weights.pt")
    return (tmp_path / "weights.pt").read_bytes()


def test_a_checkpoint_is_downloaded_and_read(server, weights, tmp_path, monkeypatch):
    server.content, server.break_offs = weights, [100]
    monkeypatch.setitem(download.MODEL_PATHS, "base", server.url)
    for _ in range(2):
        state = load_checkpoint("base", torch.device("cpu"), progress=False, cache_dir=tmp_path)
        assert torch.equal(state["w"], torch.arange(6.0).view(2, 3))
    assert len(server.ranges) == 2
    state = load_checkpoint("base", "meta", cache_dir=tmp_path)
    assert state["b"].device.type == "meta"


@pytest.mark.parametrize("name", download.MODEL_PATHS)
def test_a_file_that_the_user_put_into_the_folder_is_found(name, weights, tmp_path):
    file_name = download.MODEL_PATHS[name].rpartition("/")[2]
    (tmp_path / file_name).write_bytes(weights)
    assert set(load_checkpoint(name, "cpu", cache_dir=tmp_path)) == {"w", "b"}


def test_checkpoints_in_the_old_file_format_are_read(tmp_path):
    state = {"w": torch.arange(3.0)}
    torch.save(state, tmp_path / "base.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint("base", "cpu", cache_dir=tmp_path)["w"], state["w"])


def test_an_unknown_checkpoint_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown checkpoint 'bass'; there are base, upsample, "):
        load_checkpoint("bass", "cpu", cache_dir=tmp_path)


def truncated(weights):
    return weights[: len(weights) // 2]


@pytest.mark.parametrize(
    "damage",
    [truncated, lambda _: b"", lambda _: b"<!DOCTYPE html><p>404", lambda _: CONTENT],
    ids=["truncated", "empty", "web page", "other bytes"],
)
def test_a_damaged_file_in_the_cache_is_named(weights, tmp_path, damage):
    path = tmp_path / "base.pt"
    path.write_bytes(damage(weights))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")) as raised:
        load_checkpoint("base", "cpu", cache_dir=tmp_path)
    assert "\n" not in str(raised.value)


class Attack:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["ATTACKED"]),)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACKED", str(tmp_path / "attacked"))
    torch.save({"w": Attack()}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        load_checkpoint("base", "cpu", cache_dir=tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_a_file_with_other_things_than_weights_is_refused(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match="something else than named tensors"):
        load_checkpoint("base", "cpu", cache_dir=tmp_path)
