# Sourced by the recipes beside it: `launch SCRIPT NODES GPUS_PER_NODE HOURS FLAGS` starts one of them.
#
#     bash scripts/RECIPE.sh --data_path IMAGES --dump_path RUN [flags]    a SLURM job that requeues and resumes itself
#     LAUNCHER=torchrun bash scripts/RECIPE.sh ...                         torchrun on this machine; for several nodes
#         start it on each of them, with RENDEZVOUS=FIRST_NODE:PORT
#
# NODES and GPUS replace the published numbers; keep the batch of all processes with --batch_size. Flags behind the
# recipe's name replace those of the recipe.

launch() {
    local script=$1 nodes=${NODES:-$2} gpus=${GPUS:-$3} hours=$4 folder
    shift 4
    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    case ${LAUNCHER:-slurm} in
    slurm)
        exec python "$folder/run_with_submitit.py" --method "${script#main_}" --nodes "$nodes" --ngpus "$gpus" \
            --timeout $((60 * hours)) "$@"
        ;;
    torchrun)
        local rendezvous=(--standalone)
        if [ "$nodes" -gt 1 ]; then
            rendezvous=(--rdzv_backend=c10d --rdzv_endpoint="${RENDEZVOUS:?address and port of the first node}")
        fi
        exec torchrun --nnodes="$nodes" --nproc_per_node="$gpus" "${rendezvous[@]}" "$folder/$script.py" "$@"
        ;;
    *)
        echo "error: LAUNCHER=$LAUNCHER is neither slurm nor torchrun" >&2
        exit 2
        ;;
    esac
}
