"""Decoding real files: what comes out, and that broken ones give one line instead of anything else."""

import io
import math

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unimoe_ray.data.media import SAMPLE_RATE, BadMedia, MediaBytes, load_audio, load_image, load_video, pick_frames


def tone(rate: int, seconds: float, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * math.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def pitch(wave: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(wave)).argmax() * SAMPLE_RATE / len(wave))


def write_video(path, frames: int, sound: np.ndarray | None = None, rate: int = 8) -> None:
    """``frames`` grey pictures, ever lighter, of 32 x 48 pixels; ``sound`` [samples] at 16 kHz in an AAC track."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=rate)
        video.width, video.height, video.pix_fmt = 32, 48, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if sound is not None else None
        for index in range(frames):
            grey = np.full((48, 32, 3), round(255 * index / max(1, frames - 1)), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def picture(size=(20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "CMYK"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    picture().convert(mode).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert np.array_equal(np.asarray(image), np.asarray(picture().convert(mode).convert("RGB")))


def test_sixteen_bit_greys_keep_their_scale(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 128, 255]], np.uint16) * 257).save(path)
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [0, 128, 255]


def test_orientation_of_the_camera_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((20, 30)).save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").size == (20, 30)


def test_image_limits(tmp_path):
    picture((20, 30)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", max_pixels=600).size == (30, 20)
    with pytest.raises(BadMedia, match=r"a.png: 30 x 20 pixels; at most 599 are allowed"):
        load_image(tmp_path / "a.png", max_pixels=599)


@pytest.mark.parametrize(("suffix", "rate", "channels"), [("wav", 16_000, 1), ("wav", 44_100, 2), ("ogg", 8_000, 1)])
def test_sounds_become_mono_at_16_khz(tmp_path, suffix, rate, channels):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.repeat(tone(rate, 0.5)[:, None], channels, 1), rate)
    wave = load_audio(path)
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert abs(len(wave) - 8000) <= 32
    assert abs(pitch(wave) - 440) < 3
    assert abs(np.abs(wave).max() - 0.5) < 0.05


def test_channels_are_averaged(tmp_path):
    left, right = tone(16_000, 0.1), np.full(1600, 0.25, np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    assert np.allclose(load_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-6)


def test_sound_track_of_a_video(tmp_path):
    write_video(tmp_path / "a.mp4", 4, tone(16_000, 0.5, 880))
    wave = load_audio(tmp_path / "a.mp4")
    assert abs(len(wave) - 8000) < 2100  # AAC pads to whole frames
    assert abs(pitch(wave) - 880) < 10
    with pytest.raises(BadMedia, match="a.mp4: longer than 0.1 s"):
        load_audio(tmp_path / "a.mp4", max_seconds=0.1)


def test_sound_limits(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(8000, 2.0), 8000)
    assert len(load_audio(tmp_path / "a.wav", max_seconds=2.0)) > 0
    with pytest.raises(BadMedia, match="a.wav: 2 s long; at most 1.9 s are allowed"):
        load_audio(tmp_path / "a.wav", max_seconds=1.9)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(BadMedia, match="nan.wav: has samples that are not finite"):
        load_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize(("there", "wanted"), [(8, 4), (3, 4), (1, 2), (70, 2), (300, 4)])
def test_frames_are_spread_from_first_to_last(tmp_path, there, wanted):
    write_video(tmp_path / "a.mp4", there)
    frames = load_video(tmp_path / "a.mp4", wanted)
    assert len(frames) == wanted and {(f.mode, f.size) for f in frames} == {("RGB", (32, 48))}
    greys = [float(np.asarray(f).mean()) / 255 for f in frames]
    expected = np.linspace(0, 1, wanted) if there > 1 else np.zeros(wanted)
    # Long videos are thinned while they are read: the last frame kept may be a few before the last one.
    assert np.allclose(greys, expected, atol=0.5 / max(1, there - 1) + 0.05)


def test_video_limits(tmp_path):
    write_video(tmp_path / "a.mp4", 16)
    with pytest.raises(BadMedia, match="32 x 48 pixels; at most 1000"):
        load_video(tmp_path / "a.mp4", 2, max_pixels=1000)
    with pytest.raises(BadMedia, match="longer than 1 s"):
        load_video(tmp_path / "a.mp4", 2, max_seconds=1)


@given(st.integers(1, 40), st.integers(1, 12))
def test_picked_frames(there, wanted):
    picked = pick_frames(list(range(there)), wanted)
    assert len(picked) == wanted and picked == sorted(picked) and picked[0] == 0
    assert wanted == 1 or picked[-1] == there - 1
    assert wanted > there or len(set(picked)) == wanted


@pytest.mark.parametrize("rate", [7, 2_000_000_011])
def test_impossible_sample_rates_are_refused_before_resampling(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16_000, 0.01), 16_000)
    header = bytearray(path.read_bytes())
    header[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(header)
    with pytest.raises(BadMedia, match=f"a.wav: sampled at {rate} Hz; 1000 to 768000 Hz are allowed"):
        load_audio(path)


def test_a_video_cut_anywhere(tmp_path):
    write_video(tmp_path / "a.mp4", 2)
    content = (tmp_path / "a.mp4").read_bytes()
    reasons = set()
    for size in range(len(content)):
        (tmp_path / "cut.mp4").write_bytes(content[:size])
        try:
            load_video(tmp_path / "cut.mp4", 2)
        except BadMedia as error:
            reasons.add(str(error).partition(": ")[2])
    # Cut inside the description of the stream, the codec is not known.
    assert "has a video stream of an unknown codec" in reasons


def test_unusable_files(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "none.bin").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "sound.wav", tone(16_000, 0.1), 16_000)
    write_video(tmp_path / "silent.mp4", 2)
    picture().save(tmp_path / "picture.png")
    whole = (tmp_path / "picture.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    cases = [
        (load_image, "text.png", "not an image that can be read"),
        (load_image, "none.bin", "not an image that can be read"),
        (load_image, "sound.wav", "not an image that can be read"),
        (load_image, "half.png", "truncated"),
        (load_image, "missing.png", "No such file"),
        (load_image, ".", "directory"),
        (load_audio, "text.wav", "[Ff]ormat"),
        (load_audio, "none.bin", "[Ff]ormat"),
        (load_audio, "empty.wav", "has no sound samples"),
        (load_audio, "picture.png", "[Ff]ormat"),
        (load_audio, "silent.mp4", "has no sound track"),
        (load_audio, "missing.wav", "System error|No such file"),
        (load_audio, "missing.mp4", "No such file"),
        (lambda p: load_video(p, 2), "text.mp4", "Invalid data"),
        (lambda p: load_video(p, 2), "sound.wav", "has no video stream"),
        (lambda p: load_video(p, 2), "missing.mp4", "No such file"),
        (lambda p: load_video(p, 2), ".", "directory|Invalid"),
    ]
    for load, name, reason in cases:
        with pytest.raises(BadMedia, match=reason) as error:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def _files(folder) -> dict[str, bytes]:
    files = {}
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        buffer = io.BytesIO()
        picture().save(buffer, kind)
        files[f"a.{kind.lower()}"] = buffer.getvalue()
    for suffix in ("wav", "ogg", "flac"):
        soundfile.write(folder / f"a.{suffix}", tone(16_000, 0.05), 16_000)
        files[f"a.{suffix}"] = (folder / f"a.{suffix}").read_bytes()
    write_video(folder / "a.mp4", 3, tone(16_000, 0.2))
    return files | {"a.mp4": (folder / "a.mp4").read_bytes()}


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    return _files(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("image", ["a.png", "a.jpeg", "a.gif", "a.webp", "a.bmp", "a.tiff"]),
        ("sound", ["a.wav", "a.ogg", "a.flac", "a.mp4"]),
        ("video", ["a.mp4"]),
    ],
)
def test_damaged_files_are_read_or_refused(whole_files, tmp_path_factory, kind, names):
    """Cut anywhere, any bytes overwritten: an array of sane size or BadMedia, never another exception."""
    folder = tmp_path_factory.mktemp("damaged")

    @settings(max_examples=60 if kind == "image" else 25, deadline=None, database=None)
    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(names))
        content = bytearray(whole_files[name])
        for _ in range(data.draw(st.integers(0, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = folder / name
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            if kind == "image":
                assert load_image(path, max_pixels=10**6).mode == "RGB"
            elif kind == "video":
                assert len(load_video(path, 2, max_pixels=10**6, max_seconds=60)) == 2
            else:
                wave = load_audio(path, max_seconds=60)
                assert wave.ndim == 1 and np.isfinite(wave).all()
        except BadMedia as error:
            assert str(path) in str(error) and "\n" not in str(error)

    check()


# Media from memory, and formats that reach beyond themselves


@pytest.mark.parametrize("name", ["a.png", "a.wav", "a.mp3", "a.mp4"])
def test_bytes_are_read_as_the_file_is(tmp_path, name):
    path = tmp_path / name
    rng = np.random.default_rng(0)
    if name == "a.png":
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
        read = load_image
    elif name == "a.wav":
        soundfile.write(path, rng.normal(0, 0.1, 9000), 22_050)
        read = load_audio
    else:
        with av.open(str(path), "w") as container:
            if name == "a.mp3":
                stream = container.add_stream("mp3", rate=16_000)
                frame = av.AudioFrame.from_ndarray(rng.normal(0, 0.1, (1, 1152)).astype(np.float32), "fltp", "mono")
                frame.sample_rate = 16_000
            else:
                stream = container.add_stream("mpeg4", rate=8)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux([*stream.encode(frame), *stream.encode()])
        read = load_audio if name == "a.mp3" else (lambda source: load_video(source, 2)[0])
    np.testing.assert_array_equal(np.asarray(read(MediaBytes(path.read_bytes(), "part 1"))), np.asarray(read(path)))


def test_the_name_of_media_in_memory_is_in_the_reason():
    for read in (load_image, load_audio, lambda source: load_video(source, 2)):
        with pytest.raises(BadMedia, match="^messages.0.content.1: "):
            read(MediaBytes(b"no media at all", "messages.0.content.1"))


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".wav"])
def test_a_playlist_does_not_open_what_it_names(tmp_path, suffix):
    """The decoder would read a file of this machine, or a URL in its network."""
    secret = tmp_path / "secret.mp4"
    with av.open(str(secret), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(black), *stream.encode()])
    playlists = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{secret}'\n",
    )
    for playlist in playlists:
        path = tmp_path / f"list{suffix}"
        path.write_text(playlist)
        for source in (path, MediaBytes(playlist.encode(), "part")):
            with pytest.raises(BadMedia):
                load_video(source, 2)
            with pytest.raises(BadMedia):
                load_audio(source)


def test_an_eps_file_is_no_image(tmp_path):
    """Pillow would give it to Ghostscript."""
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(BadMedia, match="not an image that can be read"):
        load_image(path)
