"""The policy on media: local files, addresses that are private however they are written, redirects,
sizes, and formats that would do more than hold pixels.
"""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny_runs import IMAGES

from ernie_tune.data.media.images import load_image
from ernie_tune.serve import fetch as fetch_module
from ernie_tune.serve import media as media_module
from ernie_tune.serve.fetch import FetchPolicy, fetch, is_public
from ernie_tune.serve.media import MediaPolicy, read, read_image, read_video

DIGIT = IMAGES / "0003.png"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


class Pages(BaseHTTPRequestHandler):
    """A server of pictures, redirects and misbehaviour."""

    def do_GET(self) -> None:
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        path, _, rest = self.path.partition("?")
        hop = f"http://images.test:{self.server.server_address[1]}/digit.png"
        plain: dict[str, tuple[int, dict[str, Any], bytes]] = {
            "/to": (302, {"Location": rest}, b""),
            "/loop": (307, {"Location": f"/loop?{rest}x"}, b""),
            "/hop": (301, {"Location": hop}, b""),
            "/digit.png": (200, {}, DIGIT.read_bytes()),
            "/big": (200, {}, b"x" * 5000),
            "/claims": (200, {"Content-Length": "999999999"}, b"x"),
            "/cut": (200, {"Content-Length": "100"}, b"x" * 50),
            "/gzip": (200, {"Content-Encoding": "gzip"}, b"x"),
        }
        if path in plain:
            self.reply(*plain[path])
        elif path == "/junk":
            self.wfile.write(b"not http at all\r\n\r\n")
        elif path in ("/endless", "/slow"):
            self.reply(200, {"Content-Length": None})
            while True:
                self.wfile.write(b"x" * (100 if path == "/endless" else 1))
                time.sleep(0 if path == "/endless" else 0.05)
        else:
            self.reply(404, {})

    def reply(self, status: int, headers: dict[str, Any], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.seen = []  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def resolver(site: ThreadingHTTPServer, **names: str) -> Any:
    """Names as `names` say, connected to the test's site whatever the address, so that only the
    policy decides.
    """

    def resolve(host: str, port: int) -> Sequence[Any]:
        address = names.get(host.replace(".", "_"), host)
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        return [(socket.AF_INET, *entry[1:4], entry[4]) for entry in found]

    return resolve


OWN = FetchPolicy(allowed_hosts=frozenset({"images.test"}), max_bytes=4000, timeout_seconds=1.0)


def got(site: ThreadingHTTPServer, path: str, policy: FetchPolicy = OWN) -> bytes:
    url = f"http://images.test:{site.server_address[1]}{path}"
    return fetch(url, policy, "image", resolver(site, images_test="127.0.0.1"))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:a9fe:a9fe",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:808:808:0:0:80ff:fffe",
    ],
)
def test_addresses_that_are_not_of_the_open_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "0",
    ],
)
def test_this_machine_under_all_its_names(host: str, site: ThreadingHTTPServer) -> None:
    seen = len(site.seen)  # type: ignore[attr-defined]
    for policy in (FetchPolicy(), OWN):
        with pytest.raises(ValueError, match=r"must (lead to a public address|name a host that exists)"):
            fetch(f"http://{host}:{site.server_address[1]}/digit.png", policy, "image")
    assert len(site.seen) == seen, "nothing was asked"  # type: ignore[attr-defined]


def test_a_name_with_one_private_address_among_public_ones(site: ThreadingHTTPServer) -> None:
    def both(host: str, port: int) -> Sequence[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("8.8.8.8", "10.0.0.1")]

    with pytest.raises(ValueError, match="must lead to a public address"):
        fetch("http://images.test/x", FetchPolicy(), "image", both)


def test_the_checked_address_is_the_one_that_is_asked(site: ThreadingHTTPServer) -> None:
    """A name that changes its mind after the check gains nothing: it is resolved once a hop."""
    asked: list[str] = []

    def once(host: str, port: int) -> Sequence[Any]:
        asked.append(host)
        return socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)

    port = site.server_address[1]
    assert fetch(f"http://images.test:{port}/hop", OWN, "image", once) == DIGIT.read_bytes()
    assert asked == ["images.test", "images.test"]


def test_redirects_are_followed_a_few_times_and_checked_each_time(site: ThreadingHTTPServer) -> None:
    port = site.server_address[1]
    assert got(site, "/digit.png") == got(site, "/hop") == got(site, "/to?/digit.png") == DIGIT.read_bytes()
    for target in (
        f"http://127.0.0.1:{port}/digit.png",
        f"//localhost:{port}/digit.png",
        f"http://[::ffff:127.0.0.1]:{port}/digit.png",
        "http://169.254.169.254/latest/meta-data/",
    ):
        with pytest.raises(ValueError, match="must lead to a public address, redirects too"):
            got(site, f"/to?{target}")
    for target in ("file:///etc/passwd", "gopher://images.test/", f"http://user@images.test:{port}/digit.png"):
        with pytest.raises(ValueError, match="must be http:// or https:// and a host, without a user name"):
            got(site, f"/to?{target}")
    with pytest.raises(ValueError, match="within 3 redirects"):
        got(site, "/loop")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/big", "must be at most 4000 bytes"),
        ("/claims", "must be at most 4000 bytes"),
        ("/endless", "must be at most 4000 bytes"),
        ("/slow", "TimeoutError"),
        ("/cut", "IncompleteRead"),
        ("/gzip", "answered with 200 and a plain body"),
        ("/nothing", "got 404"),
        ("/junk", "cannot be downloaded"),
    ],
)
def test_answers_that_are_no_picture(path: str, words: str, site: ThreadingHTTPServer) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=words):
        got(site, path)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http://images.test:0/",
        "http://images.test:99999/",
        "http://[::1/",
        "http://a\x00b/",
        "http://" + "a" * 300 + "/",
        "http://\u2100/",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"^image "):
        fetch(url, FetchPolicy(), "image")


def test_paths_are_quoted(site: ThreadingHTTPServer) -> None:
    with pytest.raises(ValueError, match="got 404"):
        got(site, "/七 x\r\nHost: evil?q=a b")
    assert site.seen[-1].startswith("/%E4%B8%83%20x")  # type: ignore[attr-defined]
    assert "\n" not in site.seen[-1]  # type: ignore[attr-defined]


def test_a_picture_is_the_same_by_every_way(site: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    want = np.asarray(load_image(DIGIT))
    policy = MediaPolicy(local_folder=IMAGES, fetch=FetchPolicy(allow_private=True))
    for url in (
        data_url(DIGIT.read_bytes()),
        data_url(DIGIT.read_bytes()).replace("data:", "DATA:"),
        DIGIT.resolve().as_uri(),
        f"http://127.0.0.1:{site.server_address[1]}/digit.png",
    ):
        np.testing.assert_array_equal(np.asarray(load_image(read_image(url, policy))), want)


def test_local_files_only_from_the_allowed_folder(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    (root / "sub").mkdir(parents=True)
    secret.write_bytes(DIGIT.read_bytes())
    (root / "a b.png").write_bytes(DIGIT.read_bytes())
    (root / "link.png").symlink_to(secret)
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "x.png").write_bytes(DIGIT.read_bytes())
    policy = MediaPolicy(local_folder=root)
    assert read(f"file://{root}/a%20b.png", policy, "image") == DIGIT.read_bytes()
    assert read(f"file://{root}/sub/../a%20b.png", policy, "image") == DIGIT.read_bytes()
    messages = set()
    for url in (
        f"file://{secret}",
        f"file://{root}/../secret.png",
        f"file://{root}/%2e%2e/secret.png",
        f"file://{root}/link.png",
        f"file://{root}/loop",
        f"file://{root}/missing.png",
        f"file://{tmp_path}/root2/x.png",
        f"file://{root}",
        f"file://{root}/a%00.png",
        "file:///etc/passwd",
        "file:///dev/zero",
        f"file://localhost{root}/a%20b.png",
        f"file:{root}/../secret.png",
        f"file://{root}/" + "x" * 5000,
        "file:///nowhere/at/all.png",
    ):
        with pytest.raises(ValueError, match="must be inside the folder that the server allows") as caught:
            read(url, policy, "image")
        messages.add(str(caught.value))
        with pytest.raises(ValueError, match="must be inside the folder"):
            read(url, MediaPolicy(), "image")
    assert len(messages) == 1, "the answer does not tell what exists"


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "a.png", "ftp://x/y", "C:\\x.png", "javascript:1", "\x00", "s3://bucket/x"]
)
def test_what_is_no_url_is_never_a_path(url: str) -> None:
    with pytest.raises(ValueError, match="must be a data:, https:// or http:// URL"):
        read(url, MediaPolicy(local_folder=Path("/")), "image")


def test_pictures_of_wrong_size_and_format() -> None:
    small = MediaPolicy(max_pixels=100)
    with pytest.raises(ValueError, match=r"\(20x20\) must have at least 1 and at most 100 pixels"):
        read_image(data_url(saved(Image.new("RGB", (20, 20)), "PNG")), small)
    tiny = MediaPolicy(fetch=FetchPolicy(max_bytes=10))
    with pytest.raises(ValueError, match="must be at most 10 bytes"):
        read_image(data_url(DIGIT.read_bytes()), tiny)
    script = saved(Image.new("L", (8, 8)), "EPS")
    for data in (script, b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_image(data_url(data), MediaPolicy())
    for url in ("data:", "data:image/png,x", "data:image/png;base64,!!!"):
        with pytest.raises(ValueError, match=r"data:image|base64"):
            read_image(url, MediaPolicy())


def clip(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(4)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=200)


def mp4(size: int = 32) -> bytes:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(4):
            frame = av.VideoFrame.from_image(Image.new("RGB", (size, size), (40 * i, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def test_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (clip("GIF"), clip("WEBP"), clip("PNG"), mp4()):
        assert read_video(data_url(data, "video/x"), MediaPolicy()) == data
        with pytest.raises(ValueError, match=r"\(32x32\) must have"):
            read_video(data_url(data, "video/x"), MediaPolicy(max_pixels=1000))
    for kind in ("GIF", "WEBP", "PNG"):
        with pytest.raises(
            ValueError, match=r"frames of 32x32\) must have at most 20000 frames and 2047 pixels in all"
        ):
            read_video(data_url(clip(kind), "video/x"), MediaPolicy(max_animation_pixels=2 * 32 * 32 - 1))
    playlist = b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10.0,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    for data in (playlist, b"ffconcat version 1.0\nfile /etc/passwd\n", b"", b"RIFF1234WAVE", b"\x00" * 100):
        with pytest.raises(ValueError, match="must be MP4, MOV, WebM"):
            read_video(data_url(data, "video/mp4"), MediaPolicy())
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_video(data_url(mp4()[:60], "video/mp4"), MediaPolicy())
    with pytest.raises(ValueError, match=r"cannot be decoded \(its head is damaged\)"):
        read_video(data_url(b"GIF89a\x10\0\x10\0", "image/gif"), MediaPolicy())
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match="needs PyAV"):
        read_video(data_url(b"\x1aE\xdf\xa3....", "video/webm"), MediaPolicy())
    assert media_module.fetch is fetch_module.fetch


def test_the_server_answers_400_to_all_of_it(golden_model: Any, site: ThreadingHTTPServer) -> None:
    import httpx
    from live import live
    from support.tiny_runs import processor

    from ernie_tune.generate.engine import Engine

    port = site.server_address[1]
    with live(Engine(golden_model("tiny-a"), processor())) as one:
        for url in (
            "file:///etc/passwd",
            f"http://127.0.0.1:{port}/digit.png",
            f"http://2130706433:{port}/x",
            "../x",
            data_url(b"x"),
        ):
            for kind in ("image_url", "video_url"):
                content = [{"type": kind, kind: {"url": url}}]
                body = {"messages": [{"role": "user", "content": content}]}
                reply = httpx.post(f"{one.root}/v1/chat/completions", json=body)
                assert reply.status_code == 400
                assert reply.json()["error"]["message"].startswith(f"messages[0].content[0]: {kind[:5]} '")
