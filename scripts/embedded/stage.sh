# Sourced by the scripts that train: stage VERB RECIPE RUN starts or continues a run, unless it is finished; examples makes what the
# reproduction trains on, unless it is there.
stage() {
    local resume=()
    [[ -e "$3/config.json" ]] && return
    [[ -e "$3/checkpoints" ]] && resume=(--resume)
    .venv/bin/unmask "$1" --recipe "recipes/$2.yaml" --out "$3" "${resume[@]}"
}
examples() {
    [[ -e out/reproduction/data/mini5.jsonl ]] || .venv/bin/python benchmarks/reproduction/data.py --count 12000
}
