"""Naming shards: folders, globs, braces, lists, URLs and commands."""

import gzip
import io
import os
import tarfile

import pytest

from glide_finetune.data.shards import expand_shards, shard_names


def make_tar(path, data: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("000.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path):
    """Three shards, one of them in a sub-folder, among other files."""
    for name in ("s-0000.tar", "s-0001.tar", "more/s-0002.tar"):
        make_tar(tmp_path / name)
    for name in ("README.md", "s-0000.parquet", "s-0000_stats.json"):
        (tmp_path / name).write_text("not a shard")
    return tmp_path


def paths(folder, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def test_a_folder_stands_for_the_shards_in_it_and_below(folder):
    everything = paths(folder, "more/s-0002.tar", "s-0000.tar", "s-0001.tar")
    assert expand_shards(folder) == everything
    assert expand_shards(str(folder)) == everything


def test_links_are_followed_once_and_what_is_hidden_is_not_seen(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    make_tar(elsewhere / "s-0003.tar")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    for name in ("._s-0000.tar", ".hidden/s-0004.tar"):
        make_tar(folder / name)
    names = ("linked/s-0003.tar", "more/s-0002.tar", "s-0000.tar", "s-0001.tar")
    assert expand_shards(folder) == paths(folder, *names)


def test_compressed_shards_and_any_case_count(tmp_path):
    names = ["a.tar", "b.tar.gz", "c.tgz", "d.TAR"]
    for name in names:
        make_tar(tmp_path / name)
    assert expand_shards(tmp_path) == paths(tmp_path, *names)


def test_a_file_a_glob_and_braces_name_shards(folder):
    first, second = paths(folder, "s-0000.tar", "s-0001.tar")
    assert expand_shards(first) == [first]
    assert expand_shards(f"{folder}/s-*.tar") == [first, second]
    assert expand_shards(f"{folder}/s-{{0000..0001}}.tar") == [first, second]
    assert expand_shards(f"{folder}/s-000{{1,0}}.tar") == [second, first]
    assert len(expand_shards(f"{folder}/**/s-*.tar")) == 3


def test_a_glob_takes_only_shards_and_folders_of_them(folder):
    everything = paths(folder, "more/s-0002.tar", "s-0000.tar", "s-0001.tar")
    assert expand_shards(f"{folder}/*") == everything
    with pytest.raises(ValueError, match=r"no shard .*\*\.json: no shard matches"):
        expand_shards(f"{folder}/*.json")


def test_several_are_joined_and_each_comes_once(folder):
    first, second = paths(folder, "s-0000.tar", "s-0001.tar")
    assert expand_shards([first, second, first, f"{folder}/s-*.tar"]) == [first, second]


def test_a_tar_file_of_another_name_is_a_shard(tmp_path):
    plain = make_tar(tmp_path / "part-7")
    packed = tmp_path / "part-8.bin"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert expand_shards([plain, packed]) == [str(plain), str(packed)]


def test_names_with_special_characters_are_taken_as_they_are(tmp_path):
    odd = make_tar(tmp_path / "[a] {b,c}*.tar")
    assert expand_shards(odd) == [str(odd)]


def test_urls_and_commands_only_have_their_braces_expanded(tmp_path):
    assert expand_shards("https://host/{a,b}.tar") == ["https://host/a.tar", "https://host/b.tar"]
    assert expand_shards("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    command = r"pipe:tar -c . | sed -e 's/\./{x}/'"
    assert expand_shards(command) == [command]


def test_a_list_file_names_shards_in_every_way(folder, monkeypatch):
    lines = [
        "# a comment", "", "  s-0001.tar  ", "more", f"{folder}/s-000{{0,1}}.tar",
        "https://host/{a,b}.tar",
    ]  # fmt: skip
    listed = folder / "lists" / "all.txt"
    listed.parent.mkdir()
    listed.write_text("\ufeff" + "\r\n".join(lines).replace("s-0001", "../s-0001"), "utf-8")
    (folder / "lists" / "more").symlink_to(folder / "more")
    monkeypatch.chdir("/")
    found = expand_shards(listed)
    assert [os.path.realpath(path) if "://" not in path else path for path in found[:4]] == paths(
        folder, "s-0001.tar", "more/s-0002.tar", "s-0000.tar", "s-0001.tar"
    )
    assert found[-2:] == ["https://host/a.tar", "https://host/b.tar"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"pipe:touch owned\n", "commands are run only when typed"),
        (b"s-0000.tar\nmissing.tar\n", "no shard .*missing.tar: there is no such file"),
        (b"# nothing\n\n", "lists no shards"),
        (b"", "lists no shards"),
        (b"list\n", "lists .*list, which is no tar file"),
        (b"\xff\xfe\x00binary", "neither a tar file nor a text file"),
        (b"gopher://host/a.tar", "gopher:// is unknown"),
    ],
)
def test_a_list_file_that_cannot_be_used_is_one_clear_line(folder, content, message):
    (folder / "list").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        expand_shards(folder / "list")
    assert "\n" not in str(error.value)
    assert str(folder / "list") in str(error.value) or "gopher" in message or "missing" in message
    assert not (folder / "owned").exists()


def test_braces_may_stand_for_one_shard(folder):
    assert expand_shards(f"{folder}/s-{{0001..0001}}.tar") == paths(folder, "s-0001.tar")


def test_what_does_not_exist_is_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo.tar")
    for urls, message in (
        (tmp_path / "none.tar", "no shard .*none.tar: there is no such file or folder"),
        (f"{tmp_path}/s-{{0000..0002}}.tar", "no shard .*s-0000.tar"),
        (f"{tmp_path}/*.tar", "no shard matches"),
        (tmp_path / "fifo.tar", "no shard matches"),
        (tmp_path / "empty", "no shards in .*empty"),
        (tmp_path, "no shards in"),
        (f"{tmp_path}/s-{{0.tar", "cannot make out the shards .*Unbalanced braces"),
        ("s3://bucket/0.tar", "s3:// is unknown.*pipe:COMMAND"),
        ([], "empty"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            expand_shards(urls)
        assert "\n" not in str(error.value)


def test_short_names_tell_shards_apart_wherever_they_lie():
    assert list(shard_names(["/a/x/0.tar", "/a/x/1.tar"]).values()) == ["0.tar", "1.tar"]
    clash = ["x/0.tar", "y/0.tar"]
    assert list(shard_names(clash).values()) == clash
    assert list(shard_names(f"/data/{name}" for name in clash).values()) == clash
    assert list(shard_names(f"https://host/{name}" for name in clash).values()) == clash
    assert list(shard_names(["0.tar", "a/0.tar"]).values()) == ["0.tar", "a/0.tar"]
