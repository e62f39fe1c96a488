"""`completion`: a script that completes commands, options and their values in bash or zsh.

Generated once from the parser, so that a key press starts no Python. argcomplete would start it each time, and the
imports of the options take longer than a person waits for a completion.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from reranker.settings import ModelSettings
from reranker.terminal import printing

_ROOT = Path(__file__).parents[2]

_SCRIPT = """\
# Completion for `reranker`, which is `python -m reranker`:  eval "$(python -m reranker completion {target})"
{prelude}if ! command -v reranker >/dev/null 2>&1; then
  reranker() {{ PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}" {python} -m reranker "$@"; }}
fi
_reranker() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words={commands}
  else
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
      *) case "${{COMP_WORDS[1]}} $current" in
{options}
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _reranker reranker
"""
"""Without a word, `-o default` completes names of files."""
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""


def completion(args: argparse.Namespace) -> None:
    """Print the script."""
    with printing():
        print(script(args.shell, args.commands), end="")


def script(shell: str, commands: dict[str, argparse.ArgumentParser]) -> str:
    """Return the script for `bash` or `zsh`."""
    values, options = [], []
    for name, parser in commands.items():
        actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        values += [f'      "{name} {option}") words={_quoted(words)} ;;' for option, words in _values(actions)]
        flags = _quoted([action.option_strings[-1] for action in actions if action.option_strings])
        options.append(f'        "{name} -"*) words={flags} ;;')
        for action in actions:
            if not action.option_strings and action.choices:
                options.append(f'        "{name} "*) words={_quoted(list(map(str, action.choices)))} ;;')
    return _SCRIPT.format(
        target=shell,
        prelude=_ZSH if shell == "zsh" else "",
        root=shlex.quote(str(_ROOT)),
        python=shlex.quote(sys.executable),
        commands=_quoted([*commands, "--help", "--version"]),
        values="\n".join(values),
        options="\n".join(options),
    )


def _values(actions: Sequence[argparse.Action]) -> Iterator[tuple[str, list[str]]]:
    """Yield each option whose values are known, with them."""
    for action in actions:
        field = ModelSettings.model_fields.get(action.dest)
        known = action.choices or (get_args(field.annotation) if field else ())
        words = [str(value) for value in known or () if isinstance(value, str)]
        yield from ((option, words) for option in action.option_strings if words)


def _quoted(words: Sequence[str]) -> str:
    return shlex.quote(" ".join(words))
