# An image that trains: the wheel is built in the first stage and installed into the second, without the checkout.
FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir 'hatchling>=1.27' && python -m hatchling build -t wheel -d /wheels

FROM python:3.11-slim
COPY --from=build /wheels /wheels
# PyTorch's own wheels bring CUDA's libraries; the host needs its driver and the NVIDIA container toolkit only.
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
# runs, caches and downloaded models lie in the folder that is mounted here
ENV HF_HOME=/workspace/.cache/huggingface
WORKDIR /workspace
ENTRYPOINT ["python", "-m", "dreambooth_lab"]
