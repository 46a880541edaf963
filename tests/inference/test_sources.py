import logging
import sys

import cv2
import numpy as np
import pytest
from full_disk import room_for
from stream_servers import jpeg, mjpeg_server, rtsp_server

from rtmdet_fast.errors import UserError
from rtmdet_fast.images import write_image
from rtmdet_fast.inference import sources
from rtmdet_fast.inference.sources import VideoWriter, iter_sources


@pytest.fixture(autouse=True)
def warnings_are_logged(caplog):
    """Whatever the packages that ran before made of the level of logging."""
    caplog.set_level(logging.WARNING)


def picture(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((24, 32, 3), value, np.uint8))
    return path


def clip(path, frames=5, fps=10.0):
    with VideoWriter(path, fps) as video:
        for i in range(frames):
            video.write(np.full((48, 64, 3), 40 * i, np.uint8))
    return path


def test_one_image(tmp_path):
    path = picture(tmp_path / "a [1].png", 7)
    source = iter_sources(str(path))
    (frame,) = source
    assert source.total == 1
    assert (frame.name, frame.path, frame.index, frame.is_video) == ("a [1].png", str(path), 0, False)
    assert frame.image.shape == (24, 32, 3) and (frame.image == 7).all()
    assert len(list(source)) == 1  # a second time


def test_names_can_be_written_under(tmp_path):
    cv2.imwrite(str(tmp_path / "a.pgm"), np.zeros((24, 32), np.uint8))
    picture(tmp_path / "b.jpg").rename(tmp_path / "b")
    assert [f.name for f in iter_sources(tmp_path / "a.pgm")] == ["a.pgm.png"]
    assert [f.name for f in iter_sources(tmp_path / "b")] == ["b.png"]


def test_folder_is_sorted_flat_and_counts_what_it_skips(tmp_path, caplog):
    for name in ("b.jpg", "a.PNG", "c.bmp", "sub/d.jpg"):
        picture(tmp_path / name)
    (tmp_path / "labels.json").write_text("{}")
    source = iter_sources(tmp_path)
    assert [f.name for f in source] == ["a.PNG", "b.jpg", "c.bmp"]
    assert (source.total, source.skipped) == (3, 2)
    assert "2 of 5" in caplog.text


def test_glob_keeps_equal_names_apart(tmp_path):
    for name in ("x/1.jpg", "y/1.jpg", "y/z/1.jpg", "y/note.txt"):
        picture(tmp_path / name) if name.endswith("jpg") else (tmp_path / name).write_text("")
    source = iter_sources(f"{tmp_path}/**/*.*")
    assert [f.name for f in source] == ["x/1.jpg", "y/1.jpg", "y/z/1.jpg"]
    assert [f.index for f in source] == [0, 1, 2]
    assert source.skipped == 1


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_video_there_and_back(tmp_path, suffix):
    path = clip(tmp_path / "new" / f"clip{suffix}")
    source = iter_sources(path)
    frames = list(source)
    assert source.total == len(frames) == 5
    assert [f.name for f in frames] == [f"clip_{i:06d}.jpg" for i in range(5)]
    assert all(f.is_video and f.path == str(path) and f.fps == pytest.approx(10) for f in frames)
    assert frames[0].image.shape == (48, 64, 3)
    for i, frame in enumerate(frames):
        assert abs(frame.image.mean() - 40 * i) < 6


def test_videos_that_differ_by_their_suffix_stay_apart(tmp_path):
    clip(tmp_path / "a.mp4", frames=1)
    clip(tmp_path / "a.avi", frames=1)
    clip(tmp_path / "b.mp4", frames=1)
    names = [frame.name for frame in iter_sources(tmp_path)]
    assert names == ["a.avi_000000.jpg", "a.mp4_000000.jpg", "b_000000.jpg"]


def test_folder_of_images_and_videos(tmp_path):
    clip(tmp_path / "b.mp4", frames=2)
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "c.jpg")
    source = iter_sources(tmp_path)
    assert source.total == 4
    assert [(f.name, f.index) for f in source] == [
        ("a.jpg", 0),
        ("b_000000.jpg", 1),
        ("b_000001.jpg", 2),
        ("c.jpg", 3),
    ]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"missing\.jpg"):
        iter_sources(tmp_path / "missing.jpg")
    with pytest.raises(UserError, match=r"\*\.jpg"):
        iter_sources(f"{tmp_path}/*.jpg")
    with pytest.raises(UserError, match="no image or video"):
        iter_sources(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.tar is a tar archive: --shard"):
        iter_sources(tmp_path / "a.tar")
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"bad\.mp4"):
        list(iter_sources(tmp_path / "bad.mp4"))
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bad\.jpg"):
        list(iter_sources(tmp_path / "bad.jpg"))
    with pytest.raises(UserError, match="camera 97"):
        list(iter_sources("97"))


def test_skip_bad_goes_on_and_tells(tmp_path):
    for name in ("a.jpg", "c.jpg"):
        picture(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    (tmp_path / "d.mp4").write_bytes(b"not a video")
    source = iter_sources(tmp_path, skip_bad=True)
    for _ in range(2):
        assert [(f.name, f.index) for f in source] == [("a.jpg", 0), ("c.jpg", 1)]
        assert source.unreadable == [str(tmp_path / "b.jpg"), str(tmp_path / "d.mp4")]
    with pytest.raises(UserError, match=r"b\.jpg"):
        list(iter_sources(tmp_path))


def test_several_sources_are_read_in_their_order_each_file_once(tmp_path, monkeypatch):
    for name in ("x/1.jpg", "x/2.jpg", "y/1.jpg", "out/z.jpg"):
        picture(tmp_path / name)
    (tmp_path / "x/a.txt").write_text("")
    monkeypatch.chdir(tmp_path / "y")
    source = iter_sources(["1.jpg", "../x/2.jpg", tmp_path / "x", "../out/../x/*.jpg"])
    assert [f.name for f in source] == ["y/1.jpg", "x/2.jpg", "x/1.jpg"]  # never ../x: they are written under these
    assert (source.total, source.skipped) == (3, 1)
    with pytest.raises(UserError, match="7 is a camera"):
        iter_sources([tmp_path / "x", "7"])
    with pytest.raises(UserError, match=r"missing\.jpg"):
        iter_sources([tmp_path / "x", "missing.jpg"])
    with pytest.raises(UserError, match="give an image"):
        iter_sources([])


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are Unicode there")
def test_names_that_are_not_utf8(tmp_path):
    """OpenCV crashes on them."""
    picture(tmp_path / "a.png").rename(tmp_path / "\udcff.png")
    clip(tmp_path / "a.mp4").rename(tmp_path / "\udcff.mp4")
    source = iter_sources(tmp_path, skip_bad=True)
    (frame,) = source
    assert source.total is None and source.unreadable == [str(tmp_path / "\udcff.mp4")]
    image = frame.image
    assert write_image(tmp_path / "out" / frame.name, image).exists()
    with pytest.raises(UserError, match="use a name that ends in"):
        write_image(tmp_path / "a.\udcff", image)
    with pytest.raises(UserError, match=r"\\udcff.mp4': OpenCV takes no video whose name is not UTF-8"):
        list(iter_sources(tmp_path / "\udcff.mp4"))
    with pytest.raises(UserError, match="not UTF-8"), VideoWriter(tmp_path / "\udcff.avi") as video:
        video.write(image)


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_video_that_breaks_off_is_told(tmp_path, suffix, caplog):
    """An AVI tells at its start of frames that its end lacks; an MP4 without its end cannot be opened."""
    noise = np.random.default_rng(0)
    path = tmp_path / f"a{suffix}"
    with VideoWriter(path) as video:
        for _ in range(20):
            video.write(noise.integers(0, 255, (48, 64, 3), np.uint8))
    assert len(list(iter_sources(path))) == 20 and not caplog.messages
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    if suffix == ".mp4":
        with pytest.raises(UserError, match=r"a\.mp4"):
            list(iter_sources(path))
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes(len(whole) // 4) + whole[middle + len(whole) // 4 :])
    read = len(list(iter_sources(path)))
    if read < 20:  # a decoder may make something of what is damaged
        assert f"a{suffix}: {read} of the 20 frames that it tells of could be read" in caplog.text
    assert suffix == ".mp4" or 5 < read < 15


def test_frames_have_the_limit_of_images(tmp_path, monkeypatch):
    path = clip(tmp_path / "a.avi")
    monkeypatch.setenv("RTMDET_FAST_MAX_PIXELS", "3071")
    with pytest.raises(UserError, match=r"a\.avi: this image has 64x48 pixels, more than the limit of 3,071"):
        list(iter_sources(path))
    monkeypatch.setenv("RTMDET_FAST_MAX_PIXELS", "3072")
    assert len(list(iter_sources(path))) == 5


def test_an_image_behind_an_address_is_read_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(sources, "most_bytes", lambda: 10)
    with mjpeg_server([jpeg(77)]) as (host, _), pytest.raises(UserError, match=r"cannot decode this image"):
        list(iter_sources(f"http://{host}/a.jpg"))


def test_links(tmp_path, caplog):
    picture(tmp_path / "in/a.jpg")
    picture(tmp_path / "out/b.jpg")
    (tmp_path / "in/b.jpg").symlink_to("../out/b.jpg")
    assert [frame.name for frame in iter_sources(tmp_path / "in")] == ["a.jpg", "b.jpg"]
    (tmp_path / "in/c.jpg").symlink_to("nothing.jpg")
    source = iter_sources(tmp_path / "in", skip_bad=True)
    assert len(list(source)) == 2 and source.unreadable == [str(tmp_path / "in/c.jpg")]
    (tmp_path / "in/up").symlink_to(".")
    (tmp_path / "in/again").symlink_to(".")
    with pytest.raises(UserError, match="links lead back to folders above"):
        iter_sources(f"{tmp_path}/in/**/*.jpg")


def test_of_an_animation_the_first_picture_is_looked_at(tmp_path, caplog):
    from PIL import Image

    one, two = (Image.new("RGB", (32, 24), color) for color in ("red", "blue"))
    one.save(tmp_path / "a.webp", save_all=True, append_images=[two], lossless=True)
    (frame,) = iter_sources(tmp_path / "a.webp")
    assert frame.image[0, 0].tolist() == [0, 0, 255]
    assert caplog.messages == [f"{tmp_path / 'a.webp'}: holds several pictures, of which the first is looked at"]


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_a_video_that_a_full_disk_cut_off_is_told(tmp_path, suffix, room):
    noise = np.random.default_rng(0)
    with room_for(room), pytest.raises(UserError, match=rf"a\{suffix}"), VideoWriter(tmp_path / f"a{suffix}") as video:
        for _ in range(40):
            video.write(noise.integers(0, 255, (48, 64, 3), np.uint8))


def test_writer_refuses_other_sizes_and_unknown_suffixes(tmp_path):
    with VideoWriter(tmp_path / "a.mp4") as video:
        video.write(np.zeros((48, 64, 3), np.uint8))
        with pytest.raises(ValueError, match="64x48"):
            video.write(np.zeros((64, 48, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.xyz"), VideoWriter(tmp_path / "a.xyz") as video:
        video.write(np.zeros((48, 64, 3), np.uint8))


SECRETS = ("bob", "geheim")
SERVERS = {"http": mjpeg_server, "rtsp": rtsp_server}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(sources, "RECONNECT_AFTER", (0.01, 0.01))


@pytest.mark.parametrize("scheme", SERVERS)
def test_a_stream_that_breaks_off_is_opened_again_and_then_ends(scheme, impatient, caplog, capfd):
    servers = SERVERS[scheme]([[10, 60, 110, 90], [200, 250, 210, 220]], user="bob:geheim")
    with servers as (host, asked), caplog.at_level(logging.WARNING):
        frames = list(iter_sources(f"{scheme}://bob:geheim@{host}/live?token=geheim"))
    assert [round(frame.image.mean()) for frame in frames] == [10, 60, 110, 90, 200, 250, 210, 220]
    assert [frame.name for frame in frames] == [f"stream_{i:06d}.jpg" for i in range(8)]
    assert [frame.index for frame in frames] == [*range(8)]
    assert all(frame.is_video and frame.path is None for frame in frames)
    assert f"{scheme}://{host}/…: the stream broke off after 4 frames; opening it again" in caplog.messages
    assert caplog.messages[-1].endswith("the stream broke off after 8 frames and cannot be opened again")
    told = "".join([caplog.text, *capfd.readouterr()])
    assert any("geheim" in str(request) for request in asked) and not any(secret in told for secret in SECRETS)


@pytest.mark.parametrize("scheme", SERVERS)
def test_a_stream_that_cannot_be_had_is_one_sentence_without_its_password(scheme, impatient, caplog, capfd):
    with SERVERS[scheme]([[1] * 4], user="bob:geheim") as (host, _), pytest.raises(UserError) as refused:
        list(iter_sources(f"{scheme}://bob:geheim2@{host}/live?token=geheim"))
    assert str(refused.value).startswith(f"cannot open the stream {scheme}://{host}/…: it is not there, refuses")
    with pytest.raises(UserError) as closed:
        list(iter_sources(f"{scheme}://bob:geheim@{host}/geheim"))
    told = "".join([caplog.text, str(closed.value), *capfd.readouterr()])
    assert not any(secret in told for secret in SECRETS)


def test_a_video_and_an_image_behind_an_address_are_read_once(tmp_path, impatient):
    clip(tmp_path / "a.mp4")
    with mjpeg_server([(tmp_path / "a.mp4").read_bytes()]) as (host, asked):
        frames = list(iter_sources(f"http://{host}/a.mp4"))
        assert len(frames) == 5 and all(frame.is_video for frame in frames)
    with mjpeg_server([jpeg(77)], user="bob:ge heim") as (host, asked):
        (frame,) = iter_sources(f"http://bob:ge%20heim@{host}/a.jpg?size=64")
        assert (frame.name, frame.is_video, frame.image[0, 0].tolist()) == ("stream.jpg", False, [77] * 3)
        assert asked == ["/a.jpg?size=64"]
        with pytest.raises(UserError, match=f"^cannot read the image at http://{host}/…: HTTP status 401$"):
            list(iter_sources(f"http://bob:geheim@{host}/a.jpg"))
    with mjpeg_server([b"no image"]) as (host, _), pytest.raises(UserError, match=r"/…: cannot decode this image"):
        list(iter_sources(f"http://{host}/a.jpg"))
    with pytest.raises(UserError, match=f"^cannot read the image at http://{host}/…: no answer$"):
        list(iter_sources(f"http://{host}/a.jpg"))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://bob:geheim@camera:554/geheim?geheim#geheim", "rtsp://camera:554/…"),
        ("rtsp://bob:ge@heim@camera/", "rtsp://camera/…"),
        ("rtsp://[::1]:554/geheim", "rtsp://[::1]:554/…"),
        ("rtsp://bob:12/geheim@camera/live", "rtsp://…"),
        ("rtsp://bob:12?geheim@camera/live", "rtsp://…"),
        ("rtsp://bob:geheim/@camera/live", "rtsp://…"),
        ("rtsp://[bob:geheim@camera", "rtsp://…"),
    ],
)
def test_of_an_address_nothing_is_told_that_may_be_a_password(address, shown, tmp_path, capfd):
    assert sources.shown_address(address) == shown
    with pytest.raises(UserError) as beside:
        iter_sources([address, str(tmp_path)])
    assert str(beside.value).startswith(f"{shown} is a camera or stream")
    if shown == "rtsp://…" and "[" not in address:
        with pytest.raises(UserError, match=r"rtsp://… has an @ behind its host: in a password write @ as %40"):
            list(iter_sources(address))
        assert not any(secret in "".join(capfd.readouterr()) for secret in SECRETS)


def test_addresses_with_odd_characters_are_refused():
    for address in ("rtsp://camera/a b", "rtsp://camera/\udcff", "rtsp://camera/\n", "http://ü/a.jpg"):
        with pytest.raises(UserError, match="has characters that none may have"):
            list(iter_sources(address))
