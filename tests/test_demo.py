"""The demo's server: answers of the Predictor, limits, actionable errors, and no leftovers."""

import asyncio
import base64
import io
import json
import struct
import threading
import time
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image
from running import load_tool
from serving import served
from test_evaluate import checkpoint  # noqa: F401, a fixture
from test_predict import predictor as batch  # noqa: F401, a fixture

from pixel_sail import Box, Point, Predictor
from pixel_sail.config import DemoConfig, DemoLimits, EvalConfig, load_config
from pixel_sail.demo import limits as limits_module
from pixel_sail.demo.examples import render_examples
from pixel_sail.demo.limits import Refusal
from pixel_sail.demo.server import PAGE_FILES, DemoExample, _Queue
from pixel_sail.demo.sessions import Sessions
from pixel_sail.evaluation import refer_seg
from pixel_sail.evaluation.predictions import read_predictions
from pixel_sail.evaluation.run import run_evals
from pixel_sail.predictor import Chat
from pixel_sail.rle import encode_mask

LIMITS = DemoLimits(upload_mb=1.0, megapixels=1.0, text_characters=200, turns=3, waiting=2, images=3)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(4).integers(0, 256, (40, 64, 3), dtype=np.uint8))


@pytest.fixture
def predictor(batch):  # noqa: F811
    return Predictor(batch.changed(answer="forced"))


@pytest.fixture
def client(predictor, image):
    examples = [DemoExample(image=image, text="the star")]
    with (
        served(predictor, limits=LIMITS, examples=examples) as address,
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        yield client


def opened(client, image):
    response = client.post("/api/images", content=png(image), headers={"content-type": "image/png"})
    assert response.status_code == 200, response.text
    return response.json()["session"]


def ask(client, session, text, regions=()):
    """Return the pieces of the answer and its last line."""
    response = client.post("/api/ask", json={"session": session, "text": text, "regions": list(regions)})
    assert response.status_code == 200, response.text
    *pieces, last = [json.loads(line) for line in response.text.splitlines()]
    return [line["piece"] for line in pieces], last


def mask_png(mask):
    return base64.b64encode(png(Image.fromarray(mask))).decode()


def test_the_answer_is_that_of_the_predictor(client, predictor, image):
    painted = np.zeros((40, 64), dtype=bool)
    painted[20:30, 5:50] = True
    regions = [Box(3, 4.5, 40, 38), Point(50.2, 7), painted]
    text = "What is between <Prompt0> and <Prompt2>?"
    expected = predictor.ask(image, text, regions)
    sent = [{"box": [3, 4.5, 40, 38]}, {"point": [50.2, 7]}, {"png": mask_png(painted)}]
    pieces, last = ask(client, opened(client, image), text, sent)
    result = last["result"]
    assert pieces == [] and result["answer"] == expected.answer == "It is [SEG]."
    assert result["masks"] == list(expected.rles) and len(result["masks"]) == 1
    assert result["scores"] == pytest.approx(expected.scores) and result["boxes"] == [list(b) for b in expected.boxes]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(result["pngs"][0]))))
    np.testing.assert_array_equal(shown, expected.masks_NHW[0])
    assert encode_mask(shown) == result["masks"][0]


def test_evaluation_predictor_and_demo_give_one_image_one_mask(
    checkpoint,  # noqa: F811
    data_root,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    options = [f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", "evals=[refshapes_val]", "progress=false"]
    # max_batch_tokens makes every expression a batch, as the others are asked one by one.
    settings = load_config("evaluate", EvalConfig, [*options, "predict.answer=forced", "predict.max_batch_tokens=1"])
    run_evals(settings)
    scored = read_predictions(tmp_path / "out" / "refshapes_val" / "predictions.jsonl")
    items = refer_seg.load(root=data_root / "refshapes", dataset="refshapes", split="val")
    predictor = Predictor.from_pretrained(checkpoint, config=settings.predict)
    masks = set()
    with served(predictor) as address, httpx.Client(base_url=address, timeout=30) as client:
        for item, prediction in list(zip(items, scored, strict=True))[:6]:
            result = predictor.segment(item.image_path, item.text)
            content = item.image_path.read_bytes()
            session = client.post("/api/images", content=content, headers={"content-type": "image/jpeg"}).json()[
                "session"
            ]
            shown = ask(client, session, f"Please segment {item.text} in this image.")[1]["result"]
            assert shown["masks"] == list(result.rles) == [prediction.segmentation]
            masks.add(str(shown["masks"]))
    assert len(masks) > 3


def test_an_answer_is_read_while_it_grows(batch, image):  # noqa: F811
    spoken = Predictor(batch)
    with served(spoken) as address, httpx.Client(base_url=address, timeout=30) as client:
        for text in ("a star", "the red box", "left"):
            expected = spoken.ask(image, text)
            pieces, last = ask(client, opened(client, image), text)
            assert len(pieces) > 1 and "".join(pieces) == last["result"]["answer"] == expected.answer
            assert last["result"]["text"] == expected.text and last["result"]["masks"] == list(expected.rles)


def test_a_conversation_encodes_its_image_once_until_marks_change(client, image):
    session = opened(client, image)
    box, point = {"box": [1, 2, 20, 30]}, {"point": [40, 20]}
    first = ask(client, session, "a", [box])[1]["result"]
    second = ask(client, session, "b", [box])[1]["result"]
    third = ask(client, session, "c", [box, point])[1]["result"]
    assert first["timing"]["encode_s"] > 0 and not first["goes_on"]
    assert second["timing"]["encode_s"] == 0 and second["goes_on"]
    assert third["timing"]["encode_s"] > 0 and third["goes_on"]
    assert "3 questions" in ask(client, session, "d", [box, point])[1]["error"]
    # Other marks start a new conversation, and so does a request of the user.
    assert not ask(client, session, "d", [point])[1]["result"]["goes_on"]
    assert client.post("/api/forget", json={"session": session}).status_code == 200
    assert not ask(client, session, "d", [point])[1]["result"]["goes_on"]


def test_an_example_is_an_image_like_any_other(client, predictor, image):
    info = client.get("/api/info").json()
    assert info["examples"] == ["the star"] and info["limits"]["upload_mb"] == 1.0 and info["prompts"] == 15
    session = client.post("/api/examples/0", json={}).json()["session"]
    assert ask(client, session, "the star")[1]["result"]["masks"] == list(predictor.ask(image, "the star").rles)
    for address in ("/api/examples/0", f"/api/images/{session}"):
        assert Image.open(io.BytesIO(client.get(address).content)).size == image.size


def test_an_image_is_shown_as_the_model_sees_it(client, image):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, format="JPEG", exif=exif)
    response = client.post("/api/images", content=buffer.getvalue(), headers={"content-type": "image/jpeg"})
    assert (response.json()["height"], response.json()["width"]) == (64, 40)
    shown = Image.open(io.BytesIO(client.get(f"/api/images/{response.json()['session']}").content))
    assert shown.size == (40, 64) and 0x0112 not in shown.getexif()


@pytest.mark.parametrize("size", [(1, 1), (400, 1), (2, 700), (1000, 1000)])
def test_odd_sizes_are_answered(client, size):
    result = ask(client, opened(client, Image.new("RGB", size)), "the star")[1]["result"]
    assert result["masks"][0]["size"] == [size[1], size[0]]


def header_of_a_bomb(side):
    """Return the beginning of a PNG that claims to have side x side pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return header + struct.pack(">I", 100) + b"IDAT" + b"\0" * 100


def broken_png(image):
    content = bytearray(png(image))
    content[60:200] = b"\xff" * 140
    return bytes(content)


BAD_UPLOADS = {
    "empty": (lambda image: b"", 400, "empty"),
    "text": (lambda image: b"hello, this is no image", 415, "not a readable image"),
    "cut": (lambda image: png(image)[:2000], 415, "damaged"),
    "broken": (broken_png, 415, "damaged"),
    "long file": (lambda image: png(image) + b"\0" * 1_000_001, 413, "1 MB"),
    "many pixels": (lambda image: png(Image.new("1", (2000, 2000))), 413, "2000 x 2000"),
    "a long side": (lambda image: png(Image.new("1", (66_000, 2))), 413, "66000 x 2"),
    "bomb": (lambda image: header_of_a_bomb(60_000), 413, "million pixels"),
    "script in a vector graphic": (
        lambda image: b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        415,
        "no",
    ),
    "postscript": (
        lambda image: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        415,
        "no",
    ),
    "archive": (lambda image: b"PK\x03\x04" + b"\0" * 500, 415, "not a readable image"),
}
BAD_QUESTIONS = {
    "no session": ({"session": None}, 404, "no longer"),
    "a path for a session": ({"session": "../../etc/passwd"}, 404, "no longer"),
    "no text": ({"text": " \n"}, 400, "no question"),
    "a number for a text": ({"text": 5}, 400, "no question"),
    "a long text": ({"text": "a" * 201}, 413, "201 characters"),
    "half a character": ({"text": "a \ud800 b"}, 400, "invalid character"),
    "regions as text": ({"regions": "all"}, 400, "not a list"),
    "many regions": ({"regions": [{"point": [1, 1]}] * 16}, 413, "at most 15"),
    "an unknown region": ({"regions": [{"circle": [1, 2, 3]}]}, 400, "Mark 0 is not a box"),
    "no number": ({"regions": [{"point": [1, float("nan")]}]}, 400, "Mark 0 is not a box"),
    "a huge number": ({"regions": [{"box": [0, 0, 10**400, 5]}]}, 400, "Mark 0 is not a box"),
    "no base64": ({"regions": [{"png": "%%%"}]}, 400, "Mark 0 cannot be read"),
    "a mask that is none": ({"regions": [{"png": "aGVsbG8="}]}, 415, "not a readable image"),
    "a mask of another size": ({"regions": [{"png": mask_png(np.ones((4, 4), dtype=bool))}]}, 400, "another size"),
    "outside": ({"regions": [{"box": [10, 10, 900, 30]}]}, 200, "inside the image of 64 x 40"),
    "a region nobody marked": ({"text": "What is <Prompt3>?"}, 200, "<Prompt3> found"),
    "a token of the model": ({"text": "It is [SEG]."}, 200, "only the model may say"),
}
BAD_BODIES = {
    "no JSON": (b"{", "application/json", 400, "not JSON"),
    "a list": (b"[1]", "application/json", 400, "not a JSON object"),
    "deep": (b"[" * 100_000, "application/json", 400, "not JSON"),
    "a form": (b"session=1&text=2", "application/x-www-form-urlencoded", 415, "application/json"),
    "long": (b'"' + b"a" * 8_000_001 + b'"', "application/json", 413, "too long"),
}


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """Assert that the server leaves no files here or in the temporary folder."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def assert_still_up(client, image):
    assert "result" in ask(client, opened(client, image), "the star")[1]


@pytest.mark.parametrize("what", BAD_UPLOADS)
def test_an_upload_that_is_no_image_is_rejected(nothing_left, client, image, what):
    make, status, message = BAD_UPLOADS[what]
    response = client.post("/api/images", content=make(image), headers={"content-type": "image/png"})
    assert response.status_code == status and message in response.json()["error"]
    assert_still_up(client, image)


@pytest.mark.parametrize("what", BAD_QUESTIONS)
def test_a_question_that_cannot_be_asked_is_rejected(nothing_left, client, image, what):
    changes, status, message = BAD_QUESTIONS[what]
    question = {"session": opened(client, image), "text": "the star", "regions": []} | changes
    response = client.post(
        "/api/ask", content=json.dumps(question).encode(), headers={"content-type": "application/json"}
    )
    assert response.status_code == status and message in response.json()["error"]
    assert_still_up(client, image)


@pytest.mark.parametrize("what", BAD_BODIES)
def test_a_request_body_without_question_is_rejected(nothing_left, client, image, what):
    body, kind, status, message = BAD_BODIES[what]
    response = client.post("/api/ask", content=body, headers={"content-type": kind})
    assert response.status_code == status and message in response.json()["error"]
    assert_still_up(client, image)


@pytest.mark.parametrize(
    "address",
    ["/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/page/../server.py", "/server.py", "/index.html/",
     "/api/images/x", "/api/images/..%2f..%2fserver.py", "/api/examples/1", "/api/examples/-1", "/page/",
     "/api/examples/00", "/api/examples/x", "/api/examples/" + "9" * 5000],
)  # fmt: skip
def test_no_other_file_of_the_server_can_be_read(client, address):
    response = client.get(address)
    assert response.status_code == 404 and "import" not in response.text


def test_the_page_is_served_and_may_load_nothing_from_elsewhere(client):
    for address, (_, kind) in PAGE_FILES.items():
        response = client.get(address)
        assert response.status_code == 200 and response.headers["content-type"] == kind
        assert "default-src 'none'" in response.headers["content-security-policy"]
        # The page has no inline code that would need an exception from the policy.
        assert "<script>" not in response.text and "onclick" not in response.text and " style=" not in response.text
    assert "default-src 'none'" in client.get("/nowhere").headers["content-security-policy"]


def test_pages_from_elsewhere_cannot_ask(client, image):
    assert client.get("/api/info", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/api/info", headers={"host": "localhost:80"}).status_code == 200
    # What a browser sends to another site without a preflight request.
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        response = client.post("/api/images", content=png(image), headers={"content-type": kind})
        assert response.status_code == 415
        assert client.post("/api/examples/0", content=b"{}", headers={"content-type": kind}).status_code == 415


def test_a_server_may_have_further_names(predictor):
    with served(predictor, names=["box.example"]) as address:
        assert httpx.get(f"{address}/api/info", headers={"host": "box.example"}).status_code == 200
        assert httpx.get(f"{address}/api/info", headers={"host": "www.box.example"}).status_code == 400


def test_a_server_may_listen_at_an_address_of_colons(predictor):
    with served(predictor, names=["::1"]) as address:
        for host in ("[::1]:7860", "[::1]"):
            assert httpx.get(f"{address}/api/info", headers={"host": host}).status_code == 200
        assert httpx.get(f"{address}/api/info", headers={"host": "[::2]:7860"}).status_code == 400


class Gate:
    """Answers wait before every piece until the test releases them."""

    def __init__(self, monkeypatch):
        self.pieces = threading.Semaphore(0)
        self.said, self.ended = [], threading.Event()
        monkeypatch.setattr(Chat, "stream", lambda chat, text: self._stream(text))

    def _stream(self, text):
        try:
            for index in range(1000):
                assert self.pieces.acquire(timeout=20)
                self.said.append(text)
                yield f"{index} "
        finally:
            self.ended.set()


def test_a_full_queue_is_reported_and_opens_again(client, image, monkeypatch):
    session = opened(client, image)
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        question = {"session": session, "text": "a"}
        with (
            client.stream("POST", "/api/ask", json=question) as first,
            client.stream("POST", "/api/ask", json=question),
        ):
            gate.pieces.release(1)
            assert next(first.iter_lines()) == '{"piece": "0 "}'
            refused = client.post("/api/ask", json=question)
            assert refused.status_code == 503 and "Try again" in refused.json()["error"]
            # Uploads are not in that queue.
            opened(client, image)
        gate.pieces.release(5)
        assert gate.ended.wait(20)
    for _ in range(100):
        response = client.post("/api/ask", json=question)
        if response.status_code != 503:
            break
        time.sleep(0.05)
    assert "result" in response.text


def test_an_answer_without_waiting_client_ends_early(client, image, monkeypatch):
    gate = Gate(monkeypatch)
    question = {"session": opened(client, image), "text": "a"}
    with client.stream("POST", "/api/ask", json=question) as response:
        gate.pieces.release(1)
        assert next(response.iter_lines()) == '{"piece": "0 "}'
    for _ in range(200):
        gate.pieces.release(1)
        if gate.ended.wait(0.05):
            break
    assert gate.ended.is_set() and len(gate.said) < 100


def test_a_question_of_a_disconnected_client_is_not_answered():
    worked = []

    async def leave():
        queue, before = _Queue(DemoLimits()), threading.Event()
        queue.pool.submit(before.wait, 20)
        queue.take_place()
        lines = queue.lines_of(lambda: iter(worked.append(1) or "abc"))
        del lines
        before.set()
        for _ in range(200):
            if queue.waiting == 0:
                break
            await asyncio.sleep(0.05)
        assert queue.waiting == 0
        queue.pool.shutdown()

    asyncio.run(leave())
    assert worked == []


def test_a_place_in_the_queue_is_free_when_its_answer_ends(monkeypatch):
    async def ask_again():
        queue = _Queue(DemoLimits(waiting=1))
        submit = queue.pool.submit
        # The thread returns slowly, as on a busy machine.
        monkeypatch.setattr(queue.pool, "submit", lambda run: submit(lambda: (run(), time.sleep(0.1))))
        for _ in range(3):
            queue.take_place()
            assert [line async for line in queue.lines_of(lambda: iter("abc"))] == ["a", "b", "c"]
        queue.pool.shutdown()

    asyncio.run(ask_again())


def test_a_conversation_may_be_forgotten_while_a_question_waits_for_it(predictor, image, monkeypatch):
    session = Sessions(predictor, DemoLimits()).open(image)
    session.chat_with([Point(1, 1)])
    mark = Chat.mark
    monkeypatch.setattr(Chat, "mark", lambda chat, *regions: (session.forget(), mark(chat, *regions)))
    chat, _ = session.chat_with([Point(1, 1), Point(40, 30)])
    assert chat.num_prompts == 2 and chat.ask("a").answer


def test_an_answer_of_more_masks_than_fit_into_memory_is_broken_off(client, image, monkeypatch):
    session = opened(client, image)
    made = []

    def repeating(chat, text):
        for _ in range(10):
            yield " [SE"
            yield "G]"
        made.append(text)

    monkeypatch.setattr(Chat, "stream", repeating)
    monkeypatch.setattr(limits_module, "MOST_MASK_PX", 4 * 40 * 64 + 1)
    pieces, last = ask(client, session, "a")
    assert "more than 4 masks" in last["error"] and len(pieces) == 9 and made == []


def test_an_answer_that_takes_too_long_is_broken_off(batch, image):  # noqa: F811
    with (
        served(Predictor(batch), limits=DemoLimits(answer_s=0.0)) as address,
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        session = opened(client, image)
        assert "more than 0 s" in ask(client, session, "a")[1]["error"]


def test_a_fault_of_the_model_is_logged_and_not_shown(client, image, monkeypatch, caplog):
    session = opened(client, image)
    with monkeypatch.context() as patch:

        def fail(chat, text):
            yield "It "
            raise RuntimeError("secret of the server")

        patch.setattr(Chat, "stream", fail)
        pieces, last = ask(client, session, "a")
    assert pieces == ["It "] and "secret" not in last["error"] and "log" in last["error"]
    assert "secret of the server" in caplog.text
    assert "result" in ask(client, session, "a")[1]


def test_the_image_not_used_for_longest_goes_first(client, image):
    first, second, third = (opened(client, image) for _ in range(3))
    ask(client, first, "a")
    fourth = opened(client, image)
    found = [client.get(f"/api/images/{session}").status_code for session in (first, second, third, fourth)]
    assert found == [200, 404, 200, 200]


def test_many_images_of_one_user_push_out_no_other(client, image):
    other = opened(client, image)
    own = opened(client, image)
    for _ in range(5):
        left = own
        response = client.post(f"/api/images?replaces={own}", content=png(image), headers={"content-type": "image/png"})
        own = response.json()["session"]
        assert client.get(f"/api/images/{left}").status_code == 404
    own = client.post(f"/api/examples/0?replaces={own}", json={}).json()["session"]
    assert "result" in ask(client, other, "a")[1] and "result" in ask(client, own, "a")[1]


def test_an_unused_image_is_evicted(predictor, image):
    now = [0.0]
    sessions = Sessions(predictor, DemoLimits(idle_s=10.0), clock=lambda: now[0])
    one, other = sessions.open(image).name, sessions.open(image).name
    now[0] = 8.0
    sessions.get(one)
    now[0] = 15.0
    assert sessions.get(one).name == one and len(sessions) == 1
    with pytest.raises(Refusal, match="Load it again"):
        sessions.get(other)


def test_users_do_not_see_each_others_conversations(client, predictor, image):
    other_image = Image.fromarray(255 - np.asarray(image))
    one, other = opened(client, image), opened(client, other_image)
    results = {}

    def talk(session):
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            results[session] = [ask(own, session, text)[1]["result"] for text in ("a star", "the box", "left")]

    threads = [threading.Thread(target=talk, args=(session,)) for session in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session, own_image in ((one, image), (other, other_image)):
        chat = predictor.chat(own_image)
        expected = [chat.ask(text) for text in ("a star", "the box", "left")]
        assert [result["masks"] for result in results[session]] == [list(answer.rles) for answer in expected]
    assert results[one][0]["masks"] != results[other][0]["masks"]


def test_examples_are_always_the_same_scenes():
    first, again = render_examples(3, "standard"), render_examples(4, "short")
    for one, other in zip(first, again, strict=False):
        np.testing.assert_array_equal(np.asarray(one.image), np.asarray(other.image))
        assert other.text in one.text and one.text != other.text
    assert len(again) == 4


def test_limits_can_be_set_on_the_command_line():
    config = load_config("demo", DemoConfig, ["checkpoint=x", "limits.answer_s=30", "port=8000"])
    assert config.limits.answer_s == 30 and config.port == 8000 and config.host == "127.0.0.1"


def test_the_load_test_counts_questions_and_errors(predictor):
    bench = load_tool("bench_demo")
    with served(predictor, limits=DemoLimits(waiting=2)) as address:
        one = bench.summary(bench.run_users(address, 2, 0.5, at_once=False))
        assert one["questions"] > 0 and one["errors"] == 0 and 0 < one["median_s"] <= one["p95_s"] <= one["max_s"]
        # More concurrent requests than the queue holds: every rejection is counted.
        many = bench.summary(bench.run_users(address, 8, 1.0, at_once=True))
        assert many["errors"] > 0 and "Too many questions" in many["first_error"]
