#!/usr/bin/env python3
"""Opens a report.html in a headless Chromium and asserts what a reader relies on.

    check-report.py CHROMIUM REPORT.html [--shots DIR] [--svg DIR] [--planted]

Talks to the browser over its debugging pipe (file descriptors 3 and 4), so that nothing but the browser is needed. Exit code
0 when everything holds; otherwise every failure is a line.
"""

import argparse
import base64
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTHS = (360, 768, 1280)
THEMES = ("light", "dark")
DEADLINE = 30  # seconds for one answer of the browser
CONSOLE = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
WATCH = """window.__hostile = [];
for (const n of ['alert', 'confirm', 'prompt', 'print', 'open']) window[n] = (...a) => { window.__hostile.push([n, ...a]); };"""


class Browser:
    """A Chromium and one page in it."""

    def __init__(self, program, profile):
        here_read, its_write = os.pipe()
        its_read, here_write = os.pipe()

        def wire():  # in the child: descriptor 3 is what it reads, 4 what it writes
            high_read, high_write = os.dup(its_read), os.dup(its_write)
            os.dup2(high_read, 3)
            os.dup2(high_write, 4)

        self.process = subprocess.Popen(
            [
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            preexec_fn=wire,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        self.reads, self.writes = here_read, here_write
        self.rest, self.number, self.events, self.session = b"", 0, [], None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        # What a script of a hostile sample would do is noticed before any of the page runs.
        self.ask("Page.addScriptToEvaluateOnNewDocument", source=WATCH)

    def close(self):
        try:
            session, self.session = self.session, None
            self.ask("Browser.close")
            self.process.wait(timeout=10)
        except Exception:
            self.process.kill()
            self.process.wait()

    def message(self):
        """The next message of the browser."""
        while b"\0" not in self.rest:
            if not select.select([self.reads], [], [], DEADLINE)[0]:
                raise TimeoutError(f"no answer from the browser within {DEADLINE} s")
            chunk = os.read(self.reads, 1 << 20)
            if not chunk:
                raise EOFError("the browser ended")
            self.rest += chunk
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def ask(self, method, **params):
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.writes, json.dumps(request).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def ask_browser(self, method, **params):
        session, self.session = self.session, None
        try:
            return self.ask(method, **params)
        finally:
            self.session = session

    def open(self, file):
        """Opens a file and waits until it is loaded and drawn."""
        self.events.clear()
        self.ask("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 20)))")

    def unwanted(self, file):
        """Messages of the console, dialogs, and requests for anything but the file, since it was opened."""
        lines = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method in CONSOLE:
                lines.append(f"console: {json.dumps(params)[:300]}")
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if url != file.as_uri() and not url.startswith("data:"):
                    lines.append(f"request: {url}")
        return lines

    def evaluate(self, expression):
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:600])
        return answer["result"].get("value")


# Every text node that can be seen, its contrast with what is painted behind it, as WCAG 2 defines it.
CONTRAST = r"""(() => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  const rgba = text => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = text; pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.push(rgba(getComputedStyle(e).backgroundColor));
    return chain.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement;
    if (!node.data.trim() || e.closest('script,style,title,desc')) continue;
    if (!e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    const style = getComputedStyle(e);
    const below = ground(e);
    const ink = over(rgba(e.closest('svg') ? style.fill : style.color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    if (!(ratio >= 4.5)) found.push(`${ratio.toFixed(2)} "${node.data.trim().slice(0, 40)}" ${ink.slice(0, 3)} on ${below.slice(0, 3)}`);
  }
  return { seen, found };
})()"""

WIDE_ELEMENTS = r"""(() => {
  const width = document.documentElement.clientWidth;
  const inScroller = e => { for (let p = e.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible') return true; };
  const wide = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + 0.5 && !e.closest('svg') && !inScroller(e));
  return {
    scrolls: document.documentElement.scrollWidth - width,
    wide: wide.slice(0, 5).map(e => `${e.tagName}.${e.className} ${e.textContent.slice(0, 30)}`),
  };
})()"""

# Each drawing that is shown has a size, a name, letters that can be read, and no label outside of it or on another.
DRAWINGS = r"""(() => {
  const found = [];
  let seen = 0;
  for (const svg of document.querySelectorAll('svg')) {
    if (!svg.checkVisibility()) continue;
    seen += 1;
    const box = svg.getBoundingClientRect();
    const name = svg.querySelector('title')?.textContent;
    if (!name || !svg.querySelector('desc')?.textContent) found.push('a drawing without title or description');
    if (box.width < 100 || box.height < 60) found.push(`${name}: ${box.width} x ${box.height}`);
    const letters = 12 * svg.getScreenCTM().a;
    if (letters < 9) found.push(`${name}: letters of ${letters.toFixed(1)} px`);
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [text, b] of texts)
      if (b.left < box.left - 0.5 || b.right > box.right + 0.5 || b.top < box.top - 0.5 || b.bottom > box.bottom + 0.5)
        found.push(`${name}: "${text}" leaves the drawing`);
    for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [texts[i][1], texts[j][1]];
      if (a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top + 2 < b.bottom - 2 && b.top + 2 < a.bottom - 2)
        found.push(`${name}: "${texts[i][0]}" lies on "${texts[j][0]}"`);
    }
    if (/NaN|Infinity|undefined/.test([...svg.querySelectorAll('*')].flatMap(e => ['d', 'x', 'y', 'cx', 'cy', 'width', 'height'].map(n => e.getAttribute(n))).join(' ')))
      found.push(`${name}: a place that is no number`);
  }
  return { seen, found };
})()"""

# What the page itself never has; one script is its own.
ELEMENTS = r"""(() => {
  const made = [...document.querySelectorAll('img, iframe, object, embed, form, input, a, base, script ~ script, main script')];
  return made.map(e => e.outerHTML.slice(0, 80));
})()"""

IDS = r"""(() => {
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  const named = [...document.querySelectorAll('[aria-labelledby]')].flatMap(e => e.getAttribute('aria-labelledby').split(' '));
  return ids.filter((id, i) => ids.indexOf(id) !== i).concat(named.filter(id => !ids.includes(id)).map(id => id + ' (missing)'));
})()"""


def look(page, file, theme, width, shots=None):
    """Opens a report as a reader with this theme and this width; returns what is wrong, a line each."""
    wrong = []

    def check(what, bad):
        if bad:
            wrong.append(f"{theme}, {width} px: {what}: {bad}")

    page.ask(
        "Emulation.setEmulatedMedia",
        media="screen",
        features=[{"name": "prefers-color-scheme", "value": theme}],
    )
    page.ask(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=width < 600,
    )
    page.open(file)
    # A user opens everything.
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    layout = page.evaluate(WIDE_ELEMENTS)
    check("scrolls sideways, px", layout["scrolls"] > 0 and layout["scrolls"])
    check("wider than the page", layout["wide"])
    drawings = page.evaluate(DRAWINGS)
    check("drawings", drawings["found"][:8] or (drawings["seen"] == 0 and "none"))
    contrast = page.evaluate(CONTRAST)
    check("contrast below 4.5", contrast["found"][:8])
    check("texts seen", contrast["seen"] < 50 and contrast["seen"])
    check("a script of the data ran", page.evaluate("window.__hostile"))
    check("elements made of data", page.evaluate(ELEMENTS))
    check("ids", page.evaluate(IDS))
    height, ground = page.evaluate(
        "[document.documentElement.scrollHeight, getComputedStyle(document.documentElement).backgroundColor]"
    )
    dark = sum(int(part) for part in ground.split("(")[1].rstrip(")").split(",")[:3]) < 384
    check("ground", dark != (theme == "dark") and ground)
    wrong += [f"{theme}, {width} px: {line}" for line in page.unwanted(file)]
    if shots:
        shots.mkdir(parents=True, exist_ok=True)
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 12000), "scale": 1}
        shot = page.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        (shots / f"{theme}-{width}.png").write_bytes(base64.b64decode(shot["data"]))
    return wrong


def look_closer(page, file, shots):
    """What does not depend on theme and width: texts, the theme button, paper."""
    wrong = []
    samples = file.parent / "samples.jsonl"
    if samples.exists():
        shown = "\n".join(page.evaluate("[...document.querySelectorAll('.said')].map(e => e.textContent)"))
        for line in samples.read_text().split("\n")[:50]:
            for key in ("prompt", "prediction", "reference", "base"):
                text = (json.loads(line).get(key) or "") if line else ""
                plain = "".join(visible(c) for c in text).rstrip()
                if plain not in shown:
                    wrong.append(f"a {key} is not shown: {plain[:60]!r}")
    themes = page.evaluate(
        "[0, 1, 2].map(() => { const b = document.getElementById('theme'); b.click(); "
        "return b.textContent + ', ' + getComputedStyle(document.documentElement).colorScheme; })"
    )
    if themes != ["Theme: light, light", "Theme: dark, dark", "Theme: system, dark"]:
        wrong.append(f"theme button: {themes}")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.ask("Emulation.setEmulatedMedia", media="print", features=dark)
    scheme = page.evaluate("getComputedStyle(document.documentElement).colorScheme")
    if scheme != "light":
        wrong.append(f"paper is {scheme}")
    page.ask("Emulation.setEmulatedMedia", media="", features=[])
    paper = base64.b64decode(page.ask("Page.printToPDF", printBackground=False)["data"])
    if len(paper) < 10000:
        wrong.append(f"print: {len(paper)} bytes")
    if shots:
        (shots / "print.pdf").write_bytes(paper)
    return wrong


def visible(c):
    """How the report shows a character that HTML cannot hold."""
    if c in "\n\t":
        return c
    if c < " ":
        return chr(0x2400 + ord(c))
    return {"\x7f": "\u2421", "\uffff": "\ufffd", "\u202e": "\ufffd"}.get(c, c)


# Bugs that a look at 360 px in the dark must notice: the word by which it does, what to replace in the page, and by what.
FREE = ('http-equiv="Content-Security-Policy"', 'name="no-policy"')
PLANTED = {
    "an image from the network": ("request", *FREE, "<main>", '<main><img src="http://127.0.0.1:9/a.png" alt=""/>'),
    "a script of the data": ("console", "<main>", "<main><script>alert(1)</script>"),
    "a script of the data that runs": ("ran", *FREE, "<main>", "<main><script>alert(1)</script>"),
    "an error of our script": ("console", *FREE, "var at = 0;", "var at = 0; nothing();"),
    "a box that is too wide": ("wider", *FREE, "<main>", '<main><div style="width:420px">wide</div>'),
    "faint text": ("contrast", *FREE, "<main>", '<main><p style="color:#777">faint</p>'),
    "dark letters in the dark": (
        "contrast", *FREE, ".chart .ticks text { fill: var(--muted)", ".chart .ticks text { fill: #444"),
    "a drawing without size": (
        "drawings", *FREE, 'width="360" height="220"', 'style="width:0" width="360" height="220"'),
    "a light page in the dark": ("ground", *FREE, "prefers-color-scheme:dark", "prefers-color-scheme:none"),
    "an id twice": ("ids", "<h2>Curves</h2>", '<h2 id="theme">Curves</h2>'),
    "a style that the policy forbids": ("console", "<main>", '<main style="color:red">'),
}


def planted(page, file):
    """Plants each bug in a copy of the page; returns those that nobody noticed."""
    text = file.read_text()
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (sign, *words) in PLANTED.items():
            bad = text
            for old, new in zip(words[::2], words[1::2]):
                assert old in bad, f"{name}: {old!r} is not in the page"
                bad = bad.replace(old, new)
            copy = Path(folder) / "report.html"
            copy.write_text(bad)
            noticed = look(page, copy, "dark", 360)
            if not any(sign in line for line in noticed):
                missed.append(f"planted bug not noticed as {sign}: {name}: {noticed}")
    return missed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("browser")
    parser.add_argument("report", type=Path)
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    parser.add_argument("--svg", type=Path, help="folder of SVG files to open as well")
    parser.add_argument("--planted", action="store_true", help="plant bugs as well; each must be noticed")
    arguments = parser.parse_args()
    file, failures = arguments.report.resolve(), []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        page = Browser(arguments.browser, profile)
        try:
            print(page.ask_browser("Browser.getVersion")["product"])
            for theme in THEMES:
                for width in WIDTHS:
                    failures += look(page, file, theme, width, arguments.shots)
            failures += look_closer(page, file, arguments.shots)
            for svg in sorted(arguments.svg.glob("*.svg")) if arguments.svg else []:
                page.open(svg.resolve())
                if page.evaluate("document.documentElement.tagName !== 'svg' || !!document.querySelector('parsererror')"):
                    failures.append(f"{svg.name}: not well-formed")
                failures += [f"{svg.name}: {line}" for line in page.unwanted(svg.resolve())]
            if arguments.planted and not failures:
                failures += planted(page, file)
        finally:
            page.close()
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not failures:
        bugs = f", {len(PLANTED)} planted bugs noticed" if arguments.planted else ""
        print(f"{file.name}: every check holds{bugs} ({time.monotonic() - started:.1f} s in the browser)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
