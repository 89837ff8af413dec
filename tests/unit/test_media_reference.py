"""Decoded files of real encoders against slow, plain references: what was written, or what another reader says."""

import math

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe_ray.data.media import SAMPLE_RATE, BadMedia, load_audio, load_image, load_video

RNG = np.random.default_rng(0)


def smooth_picture(height=48, width=64) -> np.ndarray:
    """Slow gradients, which lossy encoders keep."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return (255 * np.stack([x, y, 1 - x], -1)).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_a_camera(tmp_path, orientation):
    """The eight meanings in the Exif standard: where row 0 and column 0 of the stored picture are seen."""
    stored = smooth_picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    seen = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), seen)


def test_cmyk_jpeg(tmp_path):
    rgb = smooth_picture()
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg")).astype(int) - rgb).mean() < 3


def test_palette(tmp_path):
    colours, indices = RNG.integers(0, 256, (7, 3), dtype=np.uint8), RNG.integers(0, 7, (20, 30), dtype=np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette(colours.tobytes())
    for name in ("a.png", "a.gif", "a.bmp"):
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name)), colours[indices])


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bits(tmp_path, name):
    values = RNG.integers(0, 65_536, (20, 30)).astype(np.uint16)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 30 20 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    found = np.asarray(load_image(tmp_path / name))
    np.testing.assert_array_equal(found, np.repeat((values // 256).astype(np.uint8)[..., None], 3, -1))


def test_integers_of_more_than_sixteen_bits(tmp_path):
    Image.fromarray(np.array([[0, 70_000]], np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(BadMedia, match="a.tiff: greys of more than 16 bits"):
        load_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(np.asarray(load_image(tmp_path / name)).astype(int) - (200, 0, 0)).max() <= 8


# Sound


def tones(rate: int, seconds: float) -> np.ndarray:
    """Stereo [samples, 2]: another tone in each channel, and silence at the end of one."""
    t = np.arange(round(rate * seconds)) / rate
    left, right = 0.4 * np.sin(2 * math.pi * 440 * t), 0.3 * np.sin(2 * math.pi * 1000 * t) * (t < seconds / 2)
    return np.stack([left, right], 1).astype(np.float32)


def sinc_resampled(wave: np.ndarray, rate: int) -> np.ndarray:
    """Band-limited interpolation at 16 kHz, sample by sample: the plain definition."""
    length = math.ceil(len(wave) * SAMPLE_RATE / rate)
    cutoff = min(1.0, SAMPLE_RATE / rate)
    out = np.zeros(length)
    for i in range(length):
        centre = i * rate / SAMPLE_RATE
        near = np.arange(max(0, int(centre) - 64), min(len(wave), int(centre) + 65))
        weights = cutoff * np.sinc(cutoff * (near - centre)) * np.cos(math.pi * (near - centre) / 132) ** 2
        out[i] = weights @ wave[near]
    return out


def write_av(path, codec: str, wave: np.ndarray, rate: int) -> None:
    """wave [samples, channels] through FFmpeg's encoder."""
    layout = {1: "mono", 2: "stereo"}[wave.shape[1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0  # without a time, the encoder's delay would not be written down
        fit = av.AudioResampler(
            format=stream.codec_context.format.name,
            layout=layout,
            rate=rate,
            frame_size=stream.codec_context.frame_size or 1024,
        )
        for piece in [*fit.resample(frame), *fit.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("samples", [3_001, 4_000])
def test_resampling_is_band_limited_and_its_length_follows_from_the_samples(tmp_path, rate, samples):
    wave = tones(rate, samples / rate)[:, 0]
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    found, reference = load_audio(tmp_path / "a.wav"), sinc_resampled(wave, rate)
    assert len(found) == len(reference) == math.ceil(samples * SAMPLE_RATE / rate)
    assert np.abs(found - reference)[100:-100].max() < 4e-3


@pytest.mark.parametrize(
    ("name", "codec", "rate", "close"),
    [
        ("a.wav", None, 16_000, 1e-4),
        ("a.flac", None, 16_000, 1e-4),
        ("a.flac", None, 44_100, 4e-3),
        ("a.ogg", None, 44_100, 0.03),
        ("b.mp3", None, 44_100, 0.03),
        ("a.mp3", "mp3", 44_100, 0.03),
        ("a.mp3", "mp3", 16_000, 0.03),
        ("a.m4a", "aac", 44_100, 0.05),
        ("a.mka", "libopus", 48_000, 0.05),
        ("a.mov", "pcm_s16le", 22_050, 4e-3),
    ],
)
def test_encoded_sounds_are_what_was_written(tmp_path, name, codec, rate, close):
    """Mean of the channels, no shift, the right length: encoders' delays are taken off."""
    wave = tones(rate, 0.5)
    if codec is None:
        soundfile.write(tmp_path / name, wave, rate)
    else:
        write_av(tmp_path / name, codec, wave, rate)
    found = load_audio(tmp_path / name)
    wanted = sinc_resampled(wave.mean(1), rate) if rate != SAMPLE_RATE else wave.mean(1)
    # AAC and Opus fill their last frame with silence; the container may not say so.
    extra = len(found) - len(wanted)
    assert 0 <= extra <= (1024 * SAMPLE_RATE / rate + 1 if codec in ("aac", "libopus") else 1)
    n = min(len(found), len(wanted))
    assert np.sqrt(np.mean((found[:n] - wanted[:n])[200:-200] ** 2)) < close


# Video


def write_frames(
    path, shades: list[int], times: list[int] | None = None, codec: str = "libx264", size=(64, 48)
) -> None:
    """Grey frames shown from ``times`` (tenths of a second, every one if not given)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number, shade in enumerate(shades):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), shade, np.uint8), format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def nearest_in_time(path, wanted: int) -> list[float]:
    """The mean grey of the frames nearest to evenly spread times, with every frame decoded and kept."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time), frame.to_image()) for frame in container.decode(video=0)]
    moments = np.linspace(frames[0][0], frames[-1][0], wanted)
    picked = [min(frames, key=lambda frame: abs(frame[0] - moment)) for moment in moments]
    return [float(np.asarray(image).mean()) for _, image in picked]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mov", "mpeg4"), ("a.gif", "gif")],
)
@pytest.mark.parametrize("wanted", [1, 4, 8])
def test_frames_of_a_variable_rate_are_picked_by_time(tmp_path, name, codec, wanted):
    """A picture that stands for seconds counts for seconds, however few frames that is."""
    times = [0, 1, 2, 3, 4, 5, 31, 33, 34, 62, 63, 80] if name != "a.gif" else list(range(12))
    shades = [20 * i for i in range(12)]
    if name == "a.gif":
        pictures = [Image.new("L", (64, 48), shade) for shade in shades]
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=[100] * 5 + [900] * 7)
    else:
        write_frames(tmp_path / name, shades, times, codec)
    found = [float(np.asarray(image).mean()) for image in load_video(tmp_path / name, wanted)]
    assert np.allclose(found, nearest_in_time(tmp_path / name, wanted), atol=0.5)
    if name != "a.gif" and wanted == 4:  # 0, 2.7, 5.3 and 8 s
        assert np.allclose(found, [0, 120, 180, 220], atol=6)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_of_an_avi_which_has_no_times(tmp_path, codec):
    write_frames(tmp_path / "a.avi", [20 * i for i in range(12)], codec=codec)
    found = [float(np.asarray(image).mean()) for image in load_video(tmp_path / "a.avi", 4)]
    assert np.allclose(found, [0, 80, 140, 220], atol=6)  # frames 0, 3.7, 7.3 and 11


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_the_rotation_that_a_phone_writes(tmp_path, degrees):
    """The matrix in the track header takes a pixel (x, y) to (a x + c y, b x + d y), up to a shift."""
    picture = smooth_picture()
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    for place, value in ((0, a), (4, b), (12, c), (16, d)):
        content[matrix + place : matrix + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    y, x = np.mgrid[0:48, 0:64]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    seen = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    seen[to_y, to_x] = picture
    (found,) = load_video(path, 1)
    assert found.size == seen.shape[1::-1]
    assert np.abs(np.asarray(found).astype(int) - seen).mean() < 4


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    Image.fromarray(smooth_picture()).save(tmp_path / "a.png")
    frames = load_video(tmp_path / "a.png", 3)
    assert len(frames) == 3 and all(np.array_equal(np.asarray(f), smooth_picture()) for f in frames)


def test_a_long_video_keeps_only_what_is_asked_for(tmp_path):
    """2,001 frames, nearest in time to 5 moments: exact, though no more than two frames are held besides."""
    write_frames(tmp_path / "a.mp4", [i // 10 for i in range(2001)], codec="mpeg4", size=(32, 32))
    found = [float(np.asarray(image).mean()) for image in load_video(tmp_path / "a.mp4", 5)]
    assert np.allclose(found, nearest_in_time(tmp_path / "a.mp4", 5), atol=0.5)
