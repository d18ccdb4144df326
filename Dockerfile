# Serves `ballad app` on CPU: docker build -t ballad . && docker run --rm -p 7860:7860 ballad someone/digits
FROM python:3.12-slim

# Gradio listens on this address; without it the page can be reached from inside the container only.
ENV GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_ANALYTICS_ENABLED=False \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /src
# uv knows where the CPU builds of torch are, which have a tenth of the size of the CUDA builds.
RUN pip install --no-cache-dir "uv>=0.8,<1"
# The dependencies first: a change of the code leaves this layer as it is.
COPY setup.cfg setup.py pyproject.toml README.md LICENSE constraints.txt ./
COPY ballad_hf/_version.py ballad_hf/_version.py
RUN uv pip compile --quiet --extra app --constraint constraints.txt --torch-backend=cpu setup.cfg -o requirements.txt \
    && uv pip install --system --no-cache --torch-backend=cpu -r requirements.txt
COPY ballad_hf ballad_hf
RUN uv pip install --system --no-cache --no-deps .

RUN useradd --create-home app && mkdir -p /home/app/.cache && chown app /home/app/.cache
USER app
WORKDIR /home/app
EXPOSE 7860
HEALTHCHECK --start-period=5m --interval=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860', timeout=5)"]
ENTRYPOINT ["ballad", "app"]
# A model directory that is mounted here.
CMD ["/model"]
