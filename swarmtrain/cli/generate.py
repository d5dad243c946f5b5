"""``swarmtrain generate``: text from the weights of now, written by the swarm that trains them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from swarmtrain.cli.options import Home, Json, SiteOption, connect
from swarmtrain.cli.output import Output
from swarmtrain_peer.talk import Talk
from swarmtrain_protocols.errors import UsageError


def generate(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to go on with; - for standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="Read the prompt there.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Token ids instead of text: 1,2,3.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="At most so many.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0: always the likeliest.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Only the likeliest that reach this together.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Only the k likeliest; 0: all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed, the same draws.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this; may be repeated.")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", help="Seconds to wait for one token.")
    ] = 30.0,
    site: SiteOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Go on with a text, by the weights of now; tokens appear as they come.

    Example: ``swarmtrain generate --prompt "def " --max-tokens 64 --temperature 0.8 --seed 7``.
    Each token comes from the newest weights, whatever the swarm is doing; a worker that dies costs
    nothing but a moment. Generation never takes more than the run key ``generate_share`` of
    anybody's time.
    """
    request: dict[str, Any] = {
        **_prompt(prompt, prompt_file, tokens),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": list(stop or []),
        "timeout_s": timeout_s,
    }
    output = Output(as_json=as_json)
    with connect(home, site) as client:
        talk = Talk(client, request)
        last = _spoken(talk, "prompt" in request, as_json)
    output.result(_document(talk.begun, last))
    output.progress(f"weights after {_versions(last['versions'])} {talk.begun['counts']}")


def _spoken(talk: Talk, is_text: bool, as_json: bool) -> dict[str, Any]:
    """Print the pieces as they come; the last one, which has the whole text."""
    for piece in talk.pieces():
        if piece.get("finish"):
            if not as_json:
                sys.stdout.write("\n")
            return piece
        if not as_json:
            sys.stdout.write(piece["text"] if is_text else f"{piece['token']} ")
            sys.stdout.flush()
    raise AssertionError("the last piece says that it is the last")


def _prompt(text: str | None, file: Path | None, tokens: str | None) -> dict[str, Any]:
    """The prompt as the call wants it.

    Raises:
        UsageError: none, several, unreadable, or ids that are no numbers.
    """
    if sum(one is not None for one in (text, file, tokens)) != 1:
        raise UsageError(
            "the prompt", "one of --prompt, --prompt-file and --tokens is needed", "give one"
        )
    if tokens is not None:
        try:
            return {"tokens": [int(one) for one in tokens.replace(",", " ").split()]}
        except ValueError as error:
            raise UsageError(f"--tokens {tokens}", str(error), "such as 1,2,3") from None
    if file is not None:
        try:
            return {"prompt": file.read_text("utf-8")}
        except OSError as error:
            raise UsageError(f"--prompt-file {file}", error.strerror or str(error)) from None
        except UnicodeDecodeError as error:
            raise UsageError(f"--prompt-file {file}", str(error), "give --tokens") from None
    return {"prompt": sys.stdin.read() if text == "-" else text}


def _document(begun: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    used = {"prompt_tokens": begun["prompt_tokens"], "completion_tokens": len(last["tokens"])}
    return {
        "ok": True,
        "text": last["text"],
        "tokens": last["tokens"],
        "finish_reason": last["finish"],
        "usage": {**used, "total_tokens": sum(used.values())},
        "versions": [{"version": version, "tokens": n} for version, n in last["versions"]],
        "counts": begun["counts"],
        "run": begun["run"],
    }


def _versions(versions: list[list[int]]) -> str:
    first, last = versions[0][0], versions[-1][0]
    return str(first) if first == last else f"{first} to {last}"
