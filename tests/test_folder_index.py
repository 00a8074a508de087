"""What is found in a local folder, with which captions, and what is left out."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.folder_index import MAX_NAMED, check_folder, index_folder
from glide_finetune.data.path_list import PathList


def touch(folder: Path, *names: str) -> None:
    """Empty files, as an index looks at names alone."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write(folder: Path, **contents: str) -> None:
    """Text files by their name, in which "__" stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def captions(folder: Path) -> dict[str, list[str]]:
    """Those of all the images found; the quick check has to agree."""
    check_folder(folder, use_captions=True)
    index = index_folder(folder, use_captions=True)
    return {image: index.read_captions(i) for i, image in enumerate(index.images)}


class TestWhatIsFound:
    def test_images_come_in_the_order_of_their_paths(self, tmp_path):
        names = ["b.png", "a/z.png", "a.png", "a-b/c.png", "a/b/c.png", "a0.png", "é.png", "A.png"]
        touch(tmp_path, *names)
        assert list(index_folder(tmp_path, use_captions=False).images) == sorted(names)

    def test_what_only_has_the_name_of_an_image_is_named_and_left_out(self, tmp_path, caplog):
        touch(tmp_path, "a.png", "folder.png/inside.png")
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "dangling.png").symlink_to("nowhere.png")
        (tmp_path / "loop.png").symlink_to("loop.png")
        index = index_folder(tmp_path, use_captions=False)
        assert index.images == ["a.png", "folder.png/inside.png"]
        assert index.left_out.counts == {"image": 4}
        reasons = {Path(name).name: reason for name, _, reason in index.left_out.named}
        assert reasons == {
            "folder.png": "a folder, not an image",
            "pipe.jpg": "not a regular file",
            "dangling.png": "a link that leads nowhere: No such file or directory",
            "loop.png": "a link that leads nowhere: Too many levels of symbolic links",
        }
        for name in reasons:
            assert caplog.text.count(f"{name}: ") == 1

    def test_a_sub_folder_that_cannot_be_listed_is_named_and_left_out(self, tmp_path, caplog):
        touch(tmp_path, "a.png")
        name = "long" * 60
        where = os.open(tmp_path, os.O_RDONLY)
        for _ in range(18):  # deeper than a path can tell, which stops root too
            os.mkdir(name, dir_fd=where)
            inner = os.open(name, os.O_RDONLY, dir_fd=where)
            os.close(where)
            where = inner
        os.close(where)
        index = index_folder(tmp_path, use_captions=False)
        assert index.images == ["a.png"]
        assert index.left_out.counts == {"folder": 1}
        assert "long/: the folder cannot be listed: File name too long" in caplog.text

    def test_names_that_are_not_utf_8_are_found(self, tmp_path):
        name = os.fsdecode(b"caf\xe9.png")
        touch(tmp_path, name)
        write(tmp_path, **{os.fsdecode(b"caf\xe9__txt"): "coffee"})
        assert captions(tmp_path) == {name: ["coffee"]}


class TestCaptionFiles:
    def test_each_line_is_a_caption_in_any_case_of_the_suffix(self, tmp_path):
        touch(tmp_path, "a.png", "b.JPG", "c.webp")
        write(tmp_path, a__txt="one\n \n two \n", b__CAPTION="\ufeffthree", c__Txt="four")
        assert captions(tmp_path) == {
            "a.png": ["one", "two"],
            "b.JPG": ["three"],
            "c.webp": ["four"],
        }

    def test_a_txt_file_comes_before_a_caption_file(self, tmp_path):
        touch(tmp_path, "a.png")
        write(tmp_path, a__caption="second", a__txt="first")
        assert captions(tmp_path) == {"a.png": ["first"]}

    def test_an_image_whose_caption_file_is_no_good_stays_until_it_is_read(self, tmp_path):
        touch(tmp_path, "blank.png", "pipe.png", "folder.png", "loop.png", "long.png")
        touch(tmp_path, "blank.txt", "folder.txt/x.gif")
        os.mkfifo(tmp_path / "pipe.txt")
        (tmp_path / "loop.txt").symlink_to("loop.txt")
        write(tmp_path, long__txt="a" * (64 * 1024 + 1))
        index = index_folder(tmp_path, use_captions=True)
        assert index.without_caption == 1
        assert index.images == ["blank.png", "folder.png", "long.png", "loop.png", "pipe.png"]
        reasons = ["blank", "not a regular file", "longer than", "Too many levels", "not a regular"]
        for image, reason in enumerate(reasons):
            with pytest.raises(BadSample, match=reason) as error:
                index.read_captions(image)
            assert error.value.kind == "caption"

    def test_images_that_share_a_caption_file_are_told(self, tmp_path):
        touch(tmp_path, "cat.jpg", "cat.k.png", "cat.png", "cat.gif", "x/cat.png", "dog.png")
        touch(tmp_path, "dog.jpg", "alone.png", "alone.gif")
        write(tmp_path, cat__txt="a cat", dog__txt="a dog")
        write(tmp_path / "x", cat__txt="another")
        index = index_folder(tmp_path, use_captions=True)
        groups = [("cat.gif", "cat.jpg", "cat.png"), ("dog.jpg", "dog.png")]
        assert index.same_stem() == (2, groups)
        assert index.same_stem(limit=1) == (2, groups[:1])
        assert index.subset([0, 3]).same_stem() == (0, [])


class TestMetadata:
    def test_json_rows_give_captions_relative_to_their_own_folder(self, tmp_path):
        touch(tmp_path, "a.png", "x/b.png", "x/y/c.png", "x/y/d.png")
        rows = [
            {"file_name": "a.png", "text": "one"},
            {"file_name": "./x/b.png", "caption": "a\nline  break", "text": " "},
        ]
        write(tmp_path, metadata__jsonl="\ufeff" + json_lines(*rows) + "\n\n")
        rows = [
            {"file_name": "c.png", "text": ["first", " ", "second"]},
            {"file_name": "../y/d.png", "text": "four", "other": [1, None]},
        ]
        write(tmp_path / "x/y", metadata__jsonl=json_lines(*rows))
        assert captions(tmp_path) == {
            "a.png": ["one"],
            "x/b.png": ["a line break"],
            "x/y/c.png": ["first", "second"],
            "x/y/d.png": ["four"],
        }

    def test_csv_rows_may_hold_commas_quotes_and_line_breaks(self, tmp_path):
        touch(tmp_path, "a.png", "b.png", "c.png")
        text = '\ufeffid,file_name,text\r\n1,b.png,"two, ""quoted"",\r\nlines"\r\n\r\n2,a.png,é\r\n'
        (tmp_path / "metadata.csv").write_bytes((text + "3,c.png,three").encode())
        assert captions(tmp_path) == {
            "a.png": ["é"],
            "b.png": ['two, "quoted", lines'],
            "c.png": ["three"],
        }

    def test_several_rows_of_an_image_are_several_captions(self, tmp_path):
        touch(tmp_path, "a.png", "b.png")
        names = ["a.png", "b.png", "a.png"]
        rows = [{"file_name": name, "text": f"{i}"} for i, name in enumerate(names)]
        write(tmp_path, metadata__jsonl=json_lines(*rows))
        write(tmp_path, metadata__csv="file_name,caption\na.png,3\n")
        assert captions(tmp_path) == {"a.png": ["3", "0", "2"], "b.png": ["1"]}

    def test_a_caption_file_beside_the_image_counts_alone(self, tmp_path):
        touch(tmp_path, "a.png", "b.png")
        write(tmp_path, a__txt="from the file", metadata__csv="file_name,text\na.png,x\nb.png,y\n")
        assert captions(tmp_path) == {"a.png": ["from the file"], "b.png": ["y"]}

    def test_bad_rows_are_left_out_and_named_with_their_line(self, tmp_path, caplog):
        bad = {
            "not JSON": "metadata is not JSON",
            "[1]": "no JSON object",
            '{"text": "x"}': "no file_name",
            '{"file_name": 7, "text": "x"}': "no file_name",
            '{"file_name": "a.png"}': "a.png has no text or caption",
            '{"file_name": "a.png", "text": " ", "caption": null}': "has no text or caption",
            '{"file_name": "a.png", "text": 3}': "has no text or caption",
            '{"file_name": "a.png", "text": "\\u0000"}': "NUL bytes",
            '{"file_name": "a.png", "text": "\\ud800"}': "not UTF-8",
            json.dumps({"file_name": "a.png", "text": "long " * 2**14}): "longer than",
            json.dumps({"file_name": "a.png", "text": "long " * 2**18}): "not JSON",
            '{"file_name": "../a.png", "text": "x"}': "outside of the data folder",
            f'{{"file_name": "{tmp_path}/data/a.png", "text": "x"}}': "outside of the data folder",
            '{"file_name": "none.png", "text": "x"}': "there is no image none.png",
            '{"file_name": "metadata.jsonl", "text": "x"}': "there is no image metadata.jsonl",
        }
        touch(tmp_path / "data", "a.png", "b.png")
        touch(tmp_path, "a.png")
        good = json_lines({"file_name": "b.png", "text": "good"})
        write(tmp_path / "data", metadata__jsonl="\n".join(bad) + "\n" + good)
        assert captions(tmp_path / "data") == {"b.png": ["good"]}
        path = tmp_path / "data/metadata.jsonl"
        for line, reason in enumerate(bad.values(), start=1):
            (message,) = (m for m in caplog.messages if f"{path} line {line}: " in m)
            assert reason in message
        assert "1 of 2 images" in caplog.text
        assert index_folder(path.parent, use_captions=True).left_out.counts["metadata"] == len(bad)

    def test_bad_csv_rows_are_left_out_and_named_with_their_line(self, tmp_path, caplog):
        touch(tmp_path, "a.png", "b.png")
        rows = [b"file_name,text", b"a.png", b"a.png,caf\xe9", b"a.png," + b"x" * 200_000]
        (tmp_path / "metadata.csv").write_bytes(b"\n".join([*rows, b"b.png,good"]))
        assert captions(tmp_path) == {"b.png": ["good"]}
        for line, reason in {2: "no text or caption", 3: "not UTF-8", 4: "field larger"}.items():
            assert any(f"line {line}: " in m and reason in m for m in caplog.messages)

    @pytest.mark.parametrize("letters", [5, 5000])  # so that a field is longer than it may be, too
    @pytest.mark.parametrize("quoted", [False, True])
    def test_a_quotation_mark_that_is_not_closed_costs_one_row(
        self, tmp_path, caplog, letters, quoted
    ):
        touch(tmp_path, *(f"{i:03}.png" for i in range(100)))
        rows = [f"{i:03}.png,{'x' * letters} {i}" for i in range(100)]
        rows[7] = '007.png,"an unclosed quotation'
        if quoted:
            rows[20] = '020.png,"quoted, with a comma"'
        write(tmp_path, metadata__csv="\n".join(["file_name,text", *rows]))
        found = captions(tmp_path)
        assert "007.png" not in found
        assert len(found) == 99
        assert found["099.png"] == [f"{'x' * letters} 99"]
        (message,) = (text for text in caplog.messages if "metadata.csv line " in text)
        assert "line 9: " in message

    def test_a_long_caption_may_have_many_lines(self, tmp_path, caplog):
        touch(tmp_path, "a.png", "b.png")
        poem = "\n".join(f"line, {i}" for i in range(60))
        write(tmp_path, metadata__csv=f'file_name,text\na.png,"{poem}"\nb.png,"one, two"\n')
        assert captions(tmp_path) == {"a.png": [poem.replace("\n", " ")], "b.png": ["one, two"]}
        assert caplog.messages == []

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (lambda path: path.write_text("a.png,one\nb.png,two\n"), "no column file_name"),
            (lambda path: path.write_text("file_name,text\n", "utf-16"), "no column file_name"),
            (lambda path: path.write_bytes(b""), "no column file_name"),
            (os.mkfifo, "not a regular file"),
            (lambda path: path.symlink_to(path), "Too many levels"),
        ],
    )
    def test_a_metadata_file_that_cannot_be_used_is_named_once(
        self, tmp_path, caplog, spoil, reason
    ):
        touch(tmp_path, "a.png")
        write(tmp_path, a__txt="a caption")
        spoil(tmp_path / "metadata.csv")
        assert captions(tmp_path) == {"a.png": ["a caption"]}
        (message,) = caplog.messages
        assert "metadata.csv" in message
        assert reason in message

    def test_of_very_many_bad_rows_the_first_are_named(self, tmp_path, caplog):
        touch(tmp_path, "a.png")
        write(tmp_path, a__txt="a caption", metadata__jsonl="bad\n" * (MAX_NAMED + 50))
        left_out = index_folder(tmp_path, use_captions=True).left_out
        assert left_out.counts == {"metadata": MAX_NAMED + 50}
        assert len(left_out.named) == MAX_NAMED
        assert len(caplog.messages) == MAX_NAMED + 1
        assert "150 unreadable metadata" in caplog.messages[-1]

    def test_metadata_that_changed_since_is_a_bad_sample(self, tmp_path):
        touch(tmp_path, "a.png", "b.png")
        write(tmp_path, metadata__csv="file_name,text\na.png,one\nb.png,two\n")
        index = index_folder(tmp_path, use_captions=True)
        assert index.read_captions(1) == ["two"]
        for text in ("file_name,text\nb.png,two\n", ""):
            write(tmp_path, metadata__csv=text)
            with pytest.raises(BadSample, match="changed since") as error:
                index.read_captions(1)
            assert error.value.kind == "metadata"

    def test_metadata_is_not_read_when_captions_are_not_used(self, tmp_path, caplog):
        touch(tmp_path, "a.png", "b.png", "b.txt")
        write(tmp_path, metadata__jsonl="bad")
        index = index_folder(tmp_path, use_captions=False)
        assert [index.read_captions(image) for image in (0, 1)] == [[], []]
        assert not caplog.messages


def test_a_subset_and_a_pickled_index_keep_each_image_its_captions(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    touch(tmp_path, *names)
    rows = [{"file_name": name, "text": [name, "too"]} for name in names[:4]]
    write(tmp_path, metadata__jsonl=json_lines(*rows), **{"1__txt": "from 1", "4__txt": "from 4"})
    index = index_folder(tmp_path, use_captions=True)
    assert index.images == names[:5]
    for chosen in (index.subset([4, 3, 1]), pickle.loads(pickle.dumps(index.subset([4, 3, 1])))):
        assert chosen.images == ["4.png", "3.png", "1.png"]
        found = [chosen.read_captions(image) for image in range(3)]
        assert found == [["from 4"], ["3.png", "too"], ["from 1"]]


def test_a_list_of_paths_acts_as_one_of_strings():
    names = ["a.png", "", "b/é\udce9.jpg", "c"]
    paths = PathList(names)
    assert list(paths) == names == [paths[i] for i in range(4)]
    assert paths == names
    assert names == paths
    assert paths != names[:3]
    assert (paths[-1], paths[1:3]) == ("c", names[1:3])
    assert "c" in paths
    with pytest.raises(IndexError):
        paths[4]


def test_the_quick_check_needs_no_torch(tmp_path):
    touch(tmp_path, *(f"{i}.png" for i in range(3)), "3.png/x.png")
    write(tmp_path, metadata__jsonl=json_lines({"file_name": "3.png/x.png", "text": "one"}))
    program = (
        "import sys; from glide_finetune.data.folder_index import check_folder;"
        f"check_folder({str(tmp_path)!r}, True);"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert output.stdout == "False False\n", output.stderr


def private_megabytes() -> float:
    with open("/proc/self/smaps_rollup") as file:
        (kilobytes,) = (line.split()[1] for line in file if line.startswith("Private_Dirty"))
    return int(kilobytes) / 1e3


def touch_all(paths: PathList, growth) -> None:
    before = private_megabytes()
    for path in paths:
        assert path
    growth.value = private_megabytes() - before


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_a_forked_worker_does_not_copy_the_paths_it_looks_at():
    paths = PathList(f"folder/{i:020}.png" for i in range(100_000))
    fork = multiprocessing.get_context("fork")
    growth = fork.Value("d", -1.0)
    worker = fork.Process(target=touch_all, args=(paths, growth))
    worker.start()
    worker.join()
    assert 0 <= growth.value < 2  # a list of str would copy all of its 8 MB
