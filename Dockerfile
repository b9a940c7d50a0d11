# A CPU or, with `docker run --gpus all`, all GPUs of the machine: torch brings its CUDA libraries.
#
#     docker build -t selfsup-papers .
#     docker run --rm --gpus all --shm-size 16g -v /path/to/images:/data -v /path/to/runs:/runs selfsup-papers \
#         python dino/main_dino.py --arch vit_small --data_path /data --output_dir /runs/dino
#
# --shm-size: loader processes hand images over in shared memory, of which Docker gives 64 MB.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=features,export
WORKDIR /opt/selfsup-papers
COPY . .
RUN pip install --no-cache-dir -e ".[${EXTRAS}]"
CMD ["python", "dino/main_dino.py", "--output_dir", "/tmp/run"]
