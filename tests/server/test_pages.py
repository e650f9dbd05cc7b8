"""Pages over plain HTTP: what they show, to whom, and that nothing which strangers wrote is more than text."""

from tests.server.raw import commit, post, request

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def test_a_repository_has_a_page_and_its_card_is_text(server, alice):
    assert post(server, "/api/repos/create", {"name": "shown"}, token=alice).status == 200
    assert commit(server, "alice/shown", alice, ("README.md", NASTY.encode()), ("<b>.txt", b"x")).status == 200
    listed = request(server, "GET", "/?search=shown")
    assert "alice/shown" in listed.body.decode()
    page = request(server, "GET", "/alice/shown")
    text = page.body.decode()
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;" in text
    assert "<script" not in request(server, "GET", "/?search=%3Cscript%3E'%22").body.decode()


def test_a_private_repository_is_on_no_page_of_others(server, alice, bob):
    post(server, "/api/repos/create", {"name": "hidden", "visibility": "private"}, token=alice)
    for token in (None, bob):
        assert b"alice/hidden" not in request(server, "GET", "/", token=token).body
        assert request(server, "GET", "/alice/hidden", token=token).status in (401, 404)
    assert b"alice/hidden" in request(server, "GET", "/", token=alice).body


def test_an_adapter_pushed_on_the_machine_has_a_page_that_says_how_to_load_it(server, run):
    from tests.conformance.hub_matrix import ADAPTER

    assert run("--store", server.store, "push", ADAPTER, "local:v1").code == 0
    text = request(server, "GET", "/local").body.decode()
    assert "PeftModel.from_pretrained" in text
    assert "content id" in text
