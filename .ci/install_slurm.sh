#!/usr/bin/env bash
# Installs what tests/slurm needs to start a private SLURM cluster. Without it these tests are skipped, so nothing
# that goes wrong here is an error.
packages=(slurmctld slurmd slurm-client munge iproute2)

if type -P slurmctld slurmd sbatch munged ip >/dev/null; then
    echo "SLURM is installed: $(slurmd -V)"
elif [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "SLURM is not installed: that takes root and apt-get; tests/slurm will be skipped"
else
    echo "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
        echo "SLURM could not be installed; tests/slurm will be skipped"
fi
exit 0
