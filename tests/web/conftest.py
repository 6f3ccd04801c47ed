"""A real studio on a free port, and a real browser that looks at it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright  # noqa: E402

START_SECONDS = 120
PAGE_MILLISECONDS = int(os.environ.get("STUDIO_TEST_MILLISECONDS", "60000"))
LATE = Path(__file__).with_name("late.py")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = {"PYTEST_CURRENT_TEST", "NICEGUI_SCREEN_TEST_PORT", "API_KEY"}
expect.set_options(timeout=PAGE_MILLISECONDS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser, a server and a training share the cores with every other test: what looks through a browser has
    a second try, and the summary names each test that took it ("RERUN")."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.flaky(reruns=1))


@dataclass
class Studio:
    """A server of its own: `url` to look at, `root` to look into."""

    root: Path
    words: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    url: str = ""
    port: int = 0
    process: subprocess.Popen | None = None
    said: list[str] = field(default_factory=list)

    def start(self) -> Studio:
        """Start it, at the port it had before."""
        program = [str(LATE)] if os.environ.get("STUDIO_TEST_LATE") else ["-m", "trueup"]
        options = ["--port", str(self.port), "--root", str(self.root)]
        command = [sys.executable, *program, "web", *options, *self.words]
        kept = {
            name: value for name, value in os.environ.items() if name not in _QUIET and not name.startswith("PYTEST")
        }
        kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **self.environment}
        self.process = subprocess.Popen(command, env=kept, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        found = threading.Event()
        threading.Thread(target=self._listen, args=(self.process, found), daemon=True).start()
        if not found.wait(START_SECONDS) or not self.url:
            self.stop()
            raise AssertionError("the studio did not start:\n" + "".join(self.said))
        return self

    def _listen(self, process: subprocess.Popen, found: threading.Event) -> None:
        for line in process.stderr:
            self.said.append(line)
            if match := re.search(r"studio is at (http://\S+:(\d+))", line):
                self.url, self.port = match[1], int(match[2])
                found.set()
        found.set()

    def stop(self, *, kill: bool = False) -> None:
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait(30)

    def end_trainings(self) -> None:
        """They outlive the server, but not the tests."""
        for record in self.root.glob("saves/**/logs/studio.json"):
            pid = int(json.loads(record.read_text(encoding="utf-8"))["pid"])
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if "trueup" in process.cmdline() and Path(process.cwd()) == self.root.resolve():
                    process.kill()


@pytest.fixture(scope="session")
def make_studio() -> Iterator:
    """make_studio(root, *words, **environment): a studio that ends with the tests."""
    made: list[Studio] = []

    def make(root: Path, *words: str, **environment: str) -> Studio:
        made.append(Studio(root, words, environment))
        return made[-1].start()

    yield make
    for studio in made:
        studio.stop()
        studio.end_trainings()


@pytest.fixture(scope="session")
def common_studio(make_studio, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return make_studio(tmp_path_factory.mktemp("studio"))


@pytest.fixture
def studio(request: pytest.FixtureRequest, common_studio: Studio, make_studio, tmp_path: Path) -> Studio:
    """One for all tests that mind their own names in it; a second try has none of the first one's runs."""
    return common_studio if getattr(request.node, "execution_count", 1) == 1 else make_studio(tmp_path)


@pytest.fixture(scope="session")
def adapted(tmp_path_factory) -> Path:
    """A root with the adapter of a run that is nearly the base, and a directory that is no model."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from trueup.builtin import builtin_path

    root = tmp_path_factory.mktemp("arena")
    base = AutoModelForCausalLM.from_pretrained(builtin_path("builtin:sql-tiny"), dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 1e-3)
    run = root / "saves" / "tiny" / "dpo"
    model.save_pretrained(run)
    (run / "run.yaml").write_text("model_name_or_path: builtin:sql-tiny\nstage: dpo\npref_beta: 0.25\n")
    broken = root / "models" / "broken"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"")
    return root


@pytest.fixture(scope="session")
def arena(make_studio, adapted: Path) -> Studio:
    """One that looks at that root."""
    return make_studio(adapted)


@pytest.fixture(scope="session")
def harmful(make_studio, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """One with a run whose every text is an attack."""
    from tests.web.test_inert import evil_run

    root = tmp_path_factory.mktemp("harmful")
    evil_run(root)
    return make_studio(root)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@dataclass
class Watch:
    """What a browser complains of. `allowed`: pieces of complaints that a test expects."""

    host: str
    found: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)

    def watch(self, context: BrowserContext) -> None:
        context.on("console", self._console)
        context.on("weberror", lambda error: self.found.append(f"error in the page: {error.error}"))
        context.on("requestfailed", self._failed)
        context.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" or "Content Security Policy" in message.text:
            self.found.append(f"console: {message.text}")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left
            self.found.append(f"failed: {request.url} {request.failure}")

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.host, "data:", "blob:")):
            self.found.append(f"outside: {request.url}")

    def check(self) -> None:
        wrong = [text for text in self.found if not any(piece in text for piece in self.allowed)]
        assert not wrong, "\n".join(wrong)


@pytest.fixture
def make_page(browser: Browser, studio: Studio) -> Iterator:
    """make_page(studio=…, language="en", theme="light", width=1280): a page of a browser context of its own.

    The test fails if the browser had anything to complain of: an error, a failed request, one to elsewhere.
    """
    opened: list[tuple[BrowserContext, Watch]] = []

    def make(at: Studio = studio, language: str = "en", theme: str = "light", width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        context.set_default_timeout(PAGE_MILLISECONDS)
        cookies = {"trueup_language": language, "trueup_theme": theme}
        context.add_cookies([{"name": name, "value": value, "url": at.url} for name, value in cookies.items()])
        watch = Watch(at.url)
        watch.watch(context)
        opened.append((context, watch))
        page = context.new_page()
        page.watch = watch  # type: ignore[attr-defined]
        return page

    yield make
    for context, _ in opened:
        context.close()
    for _, watch in opened:
        watch.check()


@pytest.fixture
def page(make_page) -> Page:
    return make_page()
