# SPDX-License-Identifier: Apache-2.0
"""A real browser without a screen, where there is one."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
]  # fmt: skip
#: Collects errors before anything else runs.
_WATCH = (
    "<script>window.errors=[];addEventListener('error',e=>errors.push(String(e.message)));</script>"
)


def run_in_browser(page, folder, script):
    """Open a page, run a script that returns JSON-able data, return (data, errors, console's errors)."""
    done = f"""<script>const result=(()=>{{{script}}})();
    const out=document.createElement('pre');out.id='found';
    out.textContent=JSON.stringify({{result, errors}});document.body.append(out);</script>"""
    watched = folder / "watched.html"
    html = page.read_text(encoding="utf-8")
    watched.write_text(html.replace("<head>", "<head>" + _WATCH, 1) + done, encoding="utf-8")
    printed = _chromium(folder, "--dump-dom", "--enable-logging=stderr", watched.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', printed.stdout, re.DOTALL)
    assert found, printed.stderr[-2000:]
    data = json.loads(unescape(found[1]))
    console = [line for line in printed.stderr.splitlines() if "CONSOLE" in line]
    return data["result"], data["errors"], console


def screenshot(page, folder, *flags):
    """Return a PNG of a page."""
    _chromium(
        folder,
        f"--screenshot={folder / 'shot.png'}",
        "--window-size=1200,2400",
        *flags,
        page.as_uri(),
    )
    return folder / "shot.png"


def _chromium(folder, *arguments):
    return subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", *arguments],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
