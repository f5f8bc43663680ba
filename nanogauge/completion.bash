# Completion of commands, flags and configuration keys, for bash; in zsh after: autoload -U bashcompinit && bashcompinit
#     source nanogauge/completion.bash

_nanogauge() {
    local word=${COMP_WORDS[COMP_CWORD]} command=("${COMP_WORDS[@]:0:2}") text
    COMPREPLY=()
    if [[ ${command[0]} == *nanogauge && $COMP_CWORD == 1 ]]; then
        text=$("${command[0]}" --help 2>/dev/null | sed -nE 's/^  ([a-z]+) .*/\1/p')
    elif [[ $word == -* ]]; then
        # train.py would import torch; all commands share the keys of the configuration.
        [[ ${command[1]} == *train.py ]] && text="--resume --claims --rehearse --supervise --force --allow-change" &&
            command[1]=${command[1]/train.py/plan.py}
        text+=" $({ "${command[@]}" --help-config || "${command[@]}" --help; } 2>/dev/null | grep -oE -- '--[a-z][a-z0-9.-]+')"
        [[ ${COMP_WORDS[1]} == *train.py ]] || text+=" $("${command[@]}" --help 2>/dev/null | grep -oE -- '--[a-z][a-z0-9-]+')"
    fi
    mapfile -t COMPREPLY < <(compgen -W "$text" -- "$word")
}

complete -o default -F _nanogauge nanogauge .venv/bin/nanogauge .venv/bin/python
