"""Which URLs are fetched, by their form alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import CannotStart
from service.images.hosts import AllowedHosts, ImageUrl, RefusedUrlError

HOSTS = AllowedHosts.of(
    ["img.example.com", "*.cdn.example.com", "http://plain.example.com", "b\u00fccher.example", "tls.example.com:8443",
     "http://10.0.0.5:9000", "[2606:4700::1111]"]
)  # fmt: skip
ALLOWED = {
    "https://img.example.com/cat.jpg": "img.example.com",
    "https://img.example.com:443/cat.jpg?size=1#top": "img.example.com",
    "HTTPS://IMG.Example.COM/": "img.example.com",
    "https://img.example.com./cat.jpg": "img.example.com",
    "https://img\u3002example\uff0ecom/": "img.example.com",
    "https://@img.example.com/": "img.example.com",
    "https://a.cdn.example.com/": "a.cdn.example.com",
    "https://a.b.cdn.example.com/": "a.b.cdn.example.com",
    "http://plain.example.com/": "plain.example.com",
    "https://b\u00fccher.example/": "xn--bcher-kva.example",
    "https://BU\u0308CHER.example/".replace("U\u0308", "\u00dc"): "xn--bcher-kva.example",
    "https://tls.example.com:8443/": "tls.example.com",
    "http://10.0.0.5:9000/": "10.0.0.5",
    "https://[2606:4700::1111]/": "2606:4700::1111",
    "https://[2606:4700:0:0:0:0:0:1111]/": "2606:4700::1111",
}
REFUSED = [
    "https://evil.example.com/", "https://img.example.com.evil.com/", "https://evil.com/img.example.com",
    "https://evilimg.example.com/", "https://cdn.example.com/", "https://evilcdn.example.com/", "https://.cdn.example.com/",
    "http://img.example.com/", "https://plain.example.com/", "https://img.example.com:8443/", "https://tls.example.com/",
    "https://img.example.com:80/", "http://10.0.0.5/", "http://10.0.0.5:9001/", "https://10.0.0.5:9000/",
    "http://012.0.0.5:9000/", "http://0xa.0.0.5:9000/", "http://10.5:9000/", "http://167772165:9000/",
    "http://10.0.0.5.:9001/", "http://[::ffff:10.0.0.5]:9000/", "https://[2606:4700::1112]/",
    "https://[2606:4700::1111%25eth0]/", "https://0x7f.1/", "https://127.1/", "https://2130706433/", "https://0/",
]  # fmt: skip
MALFORMED = [
    "", " ", "img.example.com/cat.jpg", "//img.example.com/cat.jpg", "https:img.example.com", "https:/img.example.com/",
    "https:///cat.jpg", "https://", "https://:443/", "file:///etc/passwd", "ftp://img.example.com/",
    "data:image/png;base64,AA",
    "javascript:alert(1)", "gopher://img.example.com/", "https://img.example.com:99999/", "https://img.example.com:-443/",
    "https://img.example.com:x/",
    " https://img.example.com/", "https://img.example.com\\@evil.com/", "https://img.example.com\n/", "https://img.example.com\t/",
    "https://img.example.com\0/", "https://img%2eexample.com/", "https://i%6dg.example.com/", "https://img..example.com/",
    "https://-img.example.com/", "https://img.example.com,evil.com/", "https://img.example.com;evil.com/",
    "https://img.example.com|evil.com/", "https://img example.com/", "https://\uff29mg.example.com/", "https://\u24d8mg.example.com/",
    "https://img\u200b.example.com/", "https://[::1/", "https://[img.example.com]/", "https://[::1%25lo]/",
    "https://" + "a" * 64 + ".com/", "https://" + "a." * 127 + "com/", "https://1.2.3.4.5/", "https://1.2.3.0x4/",
    "https://img.example.com/\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", ALLOWED)
def test_a_listed_host_is_found_in_every_spelling(text: str) -> None:
    assert HOSTS.checked(ImageUrl.of(text)).host == ALLOWED[text]


@pytest.mark.parametrize("text", REFUSED)
def test_other_hosts_schemes_and_ports_are_refused(text: str) -> None:
    with pytest.raises(RefusedUrlError):
        HOSTS.checked(ImageUrl.of(text))


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_plain_url_is_refused_even_where_every_host_is_allowed(text: str) -> None:
    everywhere = AllowedHosts.of(["*", "http://*"])
    with pytest.raises(RefusedUrlError):
        everywhere.checked(ImageUrl.of(text))


def test_names_and_passwords_are_refused() -> None:
    for text in (
        "https://me:secret@img.example.com/",
        "https://img.example.com@evil.com/",
        "https://me@img.example.com/",
    ):
        with pytest.raises(RefusedUrlError, match="a name and a password") as refused:
            ImageUrl.of(text)
        assert "secret" not in str(refused.value)


def test_the_target_is_percent_encoded_and_the_fragment_stays_here() -> None:
    url = ImageUrl.of("https://img.example.com/caf\u00e9 1.jpg?q=\u00fc&x=%20#secret")
    assert url.target == "/caf%C3%A9%201.jpg?q=%C3%BC&x=%20"


def test_the_authority_names_the_port_only_where_it_is_not_the_usual_one() -> None:
    texts = (
        "https://a.example:443/",
        "http://a.example:443/",
        "https://[2606::1]:8443/",
        "https://[2606::1]/",
    )
    assert [ImageUrl.of(text).authority for text in texts] == [
        "a.example", "a.example:443", "[2606::1]:8443", "[2606::1]",
    ]  # fmt: skip


def test_a_star_allows_every_name_and_no_address() -> None:
    everywhere = AllowedHosts.of(["*"])
    assert everywhere.checked(ImageUrl.of("https://any.example/")).host == "any.example"
    for text in (
        "https://1.1.1.1/",
        "https://[2606:4700::1111]/",
        "http://any.example/",
        "https://any.example:444/",
    ):
        with pytest.raises(RefusedUrlError):
            everywhere.checked(ImageUrl.of(text))


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/b.jpg", "https://img.example.com/b.jpg"),
        ("b.jpg", "https://img.example.com/a/b.jpg"),
        ("?x=1", "https://img.example.com/a/c?x=1"),
        ("//other.example/b", "https://other.example/b"),
        ("http://plain.example/", "http://plain.example/"),
    ],
)
def test_a_redirect_is_read_against_the_url_it_came_from(location: str, expected: str) -> None:
    assert ImageUrl.of("https://img.example.com/a/c").led_to(location) == ImageUrl.of(expected)


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "https://me:x@img.example.com/", "https://[::1", "\ud800"]
)
def test_a_redirect_to_no_plain_url_is_refused(location: str) -> None:
    with pytest.raises(RefusedUrlError):
        ImageUrl.of("https://img.example.com/a").led_to(location)


@given(st.text(max_size=60) | st.builds("https://{}".format, st.text(max_size=60)))
def test_any_text_is_a_url_in_ascii_or_refused(text: str) -> None:
    try:
        url = ImageUrl.of(text)
    except RefusedUrlError:
        return
    assert f"{url.host}{url.target}".isascii()
    assert url.target.startswith("/")
    assert ImageUrl.of(f"{url.scheme}://{url.authority}{url.target}") == url


@pytest.mark.parametrize(
    "word",
    ["**.example.com", "*example.com", "a.*.example.com", "ftp://a.example", "https://a.example/path", "a.example/path",
     "me@a.example", "me:x@a.example", "127.1", "*.0.0.1", "*.1", "[::1", "a.example:99999", "a b", "https://", "http://:80"],
)  # fmt: skip
def test_what_is_no_host_keeps_the_service_from_starting(word: str) -> None:
    with pytest.raises(CannotStart, match="BACKBONE_IMAGE_HOSTS"):
        AllowedHosts.of([word])
