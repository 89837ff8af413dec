"""The interactive chat in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from unimoe_ray.chat import Conversation
from unimoe_ray.data.schema import Media
from unimoe_ray.errors import UnimoeError

HELP = "Type a question. Attach files with /image, /video, /audio or /speech FILE; /quit ends."


def interact(conversation: Conversation, attached: list[Media]) -> None:
    """Questions from the terminal until end of input; files attached since the last question go with the next one."""
    console = Console()
    console.print(HELP, style="dim")
    waiting = list(attached)
    while True:
        try:
            line = console.input("[bold]you>[/] ").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        kind = command.removeprefix("/")
        if line in ("/quit", "/exit"):
            return
        if command.startswith("/") and kind in ("image", "video", "audio", "speech"):
            if Path(rest).is_file():
                waiting.append(Media(kind, (rest,)))
            else:
                console.print(f"{rest or '(no file named)'}: no such file", style="red", markup=False)
            continue
        if command.startswith("/"):
            console.print(HELP, style="dim")
            continue
        if not line and not waiting:
            continue
        try:
            reply = conversation.ask(line, waiting)
            if conversation.note:
                console.print(conversation.note, style="dim", markup=False)
            console.print(reply, style="green", markup=False)
            waiting = []
        except UnimoeError as error:
            console.print(str(error), style="red", markup=False)
            waiting = []
