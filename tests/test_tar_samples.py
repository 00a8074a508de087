"""Shards as bytes: what is read of them, and what becomes of damaged and hostile ones."""

import contextlib
import functools
import gzip
import http.server
import io
import os
import socket
import tarfile
import threading
import tracemalloc

import pytest

from glide_finetune.data import tar_samples
from glide_finetune.data.tar_samples import DamagedShard, shard_samples

WANTED = {"jpg", "txt"}


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def tar_of(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            add(tar, name, data)
    return file.getvalue()


def some_samples(count: int = 3, size: int = 3000) -> list[tuple[str, bytes]]:
    return [(f"{i:03}.{suffix}", bytes([65 + i]) * size) for i in range(count) for suffix in WANTED]


def read(source, **settings) -> tuple[dict[str, dict], str]:
    """The samples of a shard by key, and what is wrong with it."""
    samples = {}
    try:
        for key, members in shard_samples(str(source), WANTED, **settings):
            samples[key] = members
    except DamagedShard as error:
        return samples, str(error)
    return samples, ""


def saved(path, content: bytes):
    path.write_bytes(content)
    return path


def test_members_are_grouped_by_name_and_only_wanted_ones_are_read(tmp_path):
    members = [
        ("000.jpg", b"image"), ("000.TXT", b"caption"), ("000.seg.png", b"mask"),
        ("a.b/001.jpg", b"other"), ("README", b"no suffix"), ("a.b/._001.jpg", b"of a Mac"),
        ("./002.jpg", b"third"), ("002.jpg", b"twice"),
    ]  # fmt: skip
    shard = saved(tmp_path / "s.tar", tar_of(*members))
    assert list(shard_samples(str(shard), WANTED)) == [
        ("000", {"jpg": b"image", "txt": b"caption", "seg.png": None}),
        ("a.b/001", {"jpg": b"other"}),
        ("002", {"jpg": b"third"}),
        ("002", {"jpg": b"twice"}),
    ]


@pytest.mark.parametrize("compress", [gzip.compress, lambda data: data])
def test_shards_are_read_compressed_or_not(tmp_path, compress):
    shard = saved(tmp_path / "s.tgz", compress(tar_of(*some_samples())))
    samples, fault = read(shard)
    assert list(samples) == ["000", "001", "002"]
    assert not fault


def test_a_shard_cut_anywhere_gives_its_whole_samples_and_a_reason(tmp_path):
    content = tar_of(*some_samples())  # 14 blocks of 512 bytes each
    blocks = {0: 0, 0.2: 0, 1: 0, 1.4: 0, 7: 0, 14: 0, 14.2: 0, 15: 1, 15.2: 1, 21: 1, 30: 2, 42: 2}
    for end, whole in blocks.items():
        samples, fault = read(saved(tmp_path / "s.tar", content[: int(512 * end)]))
        assert fault in ("empty file", "truncated header", "unexpected end of data")
        assert list(samples) == ["000", "001"][:whole]
        assert all(len(data) == 3000 for members in samples.values() for data in members.values())
    packed = gzip.compress(content)
    for end in (0, 5, 20, len(packed) // 2):
        _, fault = read(saved(tmp_path / "s.tar.gz", packed[:end]))
        assert fault


def test_what_a_mac_packs_beside_each_file_is_passed_over(tmp_path):
    members = [
        (f"{folder}{mark}{name}", b"x")
        for folder in ("", "./", "photos/", "__MACOSX/photos/", ".data/")
        for name in ("000.jpg", "000.txt")
        for mark in ("._", "")
    ]
    members += [("photos/.DS_Store", b"x")]
    samples, fault = read(saved(tmp_path / "s.tar", tar_of(*members)))
    assert fault == ""
    assert samples.keys() == {"000", "photos/000", ".data/000"}
    assert all(members == {"jpg": b"x", "txt": b"x"} for members in samples.values())


@pytest.mark.parametrize("apart", [".txt", ".jpg"])
def test_samples_whose_files_lie_apart_are_told(tmp_path, apart):
    """As those of a folder that was packed in the order of the disk, or kind by kind."""
    members = sorted(some_samples(), key=lambda member: (member[0].endswith(apart), member[0]))
    _, fault = read(saved(tmp_path / "s.tar", tar_of(*members)))
    assert "the files of sample 000 do not lie next to each other" in fault
    assert "--sort=name" in fault


def test_a_key_may_come_twice(tmp_path):
    members = [*some_samples(1), ("001.jpg", b"x"), ("000.cls", b"x"), *some_samples(1)]
    samples, fault = read(saved(tmp_path / "s.tar", tar_of(*members)))
    assert (list(samples), fault) == (["000", "001"], "")


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 1000, bytes(range(256)) * 40])
def test_what_is_no_tar_is_damaged(tmp_path, content):
    samples, fault = read(saved(tmp_path / "s.tar", content))
    assert not samples
    assert fault in ("empty file", "invalid header")


def test_noise_in_the_middle_is_not_taken_for_the_end(tmp_path):
    content = bytearray(tar_of(*some_samples()))
    content[14 * 512 : 15 * 512] = b"noise!!!" * 64
    samples, fault = read(saved(tmp_path / "s.tar", bytes(content)))
    assert samples == {}, "whether the sample before the damage is whole, nobody knows"
    assert "in the middle" in fault


def test_links_devices_and_pipes_are_passed_over(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for i, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
        ):
            add(tar, f"{i}.jpg", type=kind, linkname="/etc/passwd")
            add(tar, f"{i}.txt", b"caption")
    samples, fault = read(path)
    assert [list(members) for members in samples.values()] == [["txt"]] * 5
    assert not fault


def patched_size(content: bytes, size: bytes) -> bytes:
    """A tar whose first header claims another size."""
    header = bytearray(content[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",
        b"\x80" + b"\x7f" * 11,
        b"\xff" * 12,
        b"\xff" * 10 + b"\0\0",
        b"-7\0       \0",
    ],
    ids=["8 GiB", "10^26", "minus one", "minus many", "a minus sign"],
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_absurd_sizes_take_no_memory_and_no_time(tmp_path, size, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        add(tar, "000.jpg", b"x" * 600, type=kind)
        add(tar, "001.jpg", b"image")
    shard = saved(tmp_path / "s.tar", patched_size(file.getvalue(), size))
    tracemalloc.start()
    samples, fault = read(shard)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fault or "001" in samples
    assert peak < 2**22


def test_a_shard_is_read_up_to_a_member_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "MAX_MEMBER_BYTES", 1000)
    members = [("000.jpg", bytes(1000)), ("001.jpg", b"small"), ("002.mp4", bytes(1001))]
    shard = saved(tmp_path / "s.tar", tar_of(*members))
    assert read(shard) == ({"000": {"jpg": bytes(1000)}}, "a member of 1001 bytes")


def test_names_become_one_line_of_text(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        add(tar, "a\nb\x1b[1m.jpg", b"image")
        add(tar, "caf\u00e9.jpg", b"image")
    assert list(read(path)[0]) == ["a\\nb\\x1b[1m", "caf\\xe9"]


def test_a_folder_a_fifo_or_nothing_in_place_of_a_shard_is_damaged(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")  # at which nobody waits for a writer
    assert read(tmp_path / "fifo.tar")[1] == read(tmp_path)[1] == "not a regular file"
    assert read(tmp_path / "none.tar")[1] == "No such file or directory"


def test_commands_are_read_and_their_failure_is_told(tmp_path):
    shard = saved(tmp_path / "s.tar", tar_of(*some_samples()))
    assert len(read(f"pipe:cat {shard}")[0]) == 3
    assert read("pipe:exit 3") == ({}, "the command ended with status 3")
    assert read("pipe:no-such-command 2>/dev/null")[1] == "the command ended with status 127"
    samples, fault = read(f"pipe:head -c 9000 {shard}; exit 4")
    assert (list(samples), fault) == (["000"], "the command ended with status 4")
    assert read("pipe:yes")[1] == "invalid header"


def test_an_endless_command_ends_when_nobody_reads_on(tmp_path):
    shard = saved(tmp_path / "s.tar", tar_of(*some_samples(30)))
    samples = shard_samples(f"pipe:while cat {shard}; do :; done", WANTED)
    assert next(samples).key == "000"
    samples.close()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; /cut/NAME breaks off in the middle, /503/NAME works at the second try."""

    refused: set[str]

    def do_GET(self):
        kind, _, name = self.path.lstrip("/").partition("/")
        if kind == "503" and self.path not in self.refused:
            self.refused.add(self.path)
            return self.send_error(503)
        self.path = f"/{name}" if name else self.path
        if kind != "cut":
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return self.wfile.write(content[: len(content) // 2])

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    handler = type("H", (Handler,), {"refused": set()})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The address of a server of s.tar and t.tar.gz, with no programs such as curl at hand."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("NO_PROXY", "*")
    folder = tmp_path / "site"
    folder.mkdir()
    content = tar_of(*some_samples(40))
    saved(folder / "s.tar", content)
    saved(folder / "t.tar.gz", gzip.compress(content))
    with served(folder) as address:
        yield address


def test_shards_come_from_web_servers(site):
    for name in ("s.tar", "t.tar.gz", "s.tar?token=1", "503/s.tar"):
        samples, fault = read(f"{site}/{name}")
        assert (len(samples), fault) == (40, "")


def test_faults_of_web_servers_are_told(site):
    assert read(f"{site}/none.tar") == ({}, "the server answered 404 File not found")
    samples, fault = read(f"{site}/cut/s.tar")
    assert 0 < len(samples) < 40
    assert "IncompleteRead" in fault
    assert read(f"{site}/cut/t.tar.gz")[1]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    assert read(f"http://127.0.0.1:{port}/s.tar") == ({}, "Connection refused")
    assert read("http://") != ({}, "")


def test_shards_of_web_servers_are_kept_in_a_cache(site, tmp_path):
    cache = tmp_path / "cache"
    assert len(read(f"{site}/s.tar", cache_path=cache)[0]) == 40
    assert len(read(f"{site}/503/s.tar", cache_path=cache)[0]) == 40
    assert "IncompleteRead" in read(f"{site}/cut/s.tar", cache_path=cache)[1]
    kept = sorted(path.name.partition("-")[2] for path in cache.iterdir())
    assert kept == ["s.tar", "s.tar"]
    (tmp_path / "site" / "s.tar").unlink()
    assert len(read(f"{site}/s.tar", cache_path=cache)[0]) == 40
