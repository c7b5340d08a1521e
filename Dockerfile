# docker build --target cpu -t knet_jax:cpu .
# docker build --target cuda -t knet_jax:cuda .    # the host needs NVIDIA's driver and container toolkit
# docker run --init --rm -v "$PWD:/workspace" knet_jax:cpu train --config shapes_panoptic:tiny

FROM python:3.13-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY knet_jax knet_jax
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim AS base
RUN useradd --create-home --uid 1000 knet && install -d -o knet /workspace
WORKDIR /workspace
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["knet"]
CMD ["--help"]

FROM base AS cuda
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/knet_jax-*.whl)[cuda]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000

FROM base AS cpu
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/knet_jax-*.whl
USER 1000
