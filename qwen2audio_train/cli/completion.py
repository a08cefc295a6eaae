"""Completion for bash and zsh: the commands, then the keys of each, as a script that is read once by the shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SCRIPT = """# qwen2audio-train: source <(qwen2audio-train --completion)
# in zsh after: autoload -U bashcompinit && bashcompinit
_qwen2audio_train() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words="{names}" place
    for ((place = 1; place < COMP_CWORD; place++)); do
        case "${{COMP_WORDS[place]}}" in
{cases}
        esac
    done
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [[ ${{COMPREPLY[0]}} != *= ]] || compopt -o nospace 2> /dev/null
}}
complete -o default -o bashdefault -F _qwen2audio_train qwen2audio-train"""


def script(keys: Mapping[str, Sequence[str]]) -> str:
    """The script, from the keys of every command; a key with `<name>` in it ends there."""
    cases = []
    for name, known in keys.items():
        words = dict.fromkeys(key.partition("<")[0] + ("" if "<" in key else "=") for key in known)
        cases.append(f'            {name}) words="--help {" ".join(words)}"; break ;;')
    return SCRIPT.format(names=" ".join(keys), cases="\n".join(cases))
