"""The routes, behind the guard."""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from trueup import __version__
from trueup.data.examples import Json
from trueup.inference.server.asking import AskChat, AskCompletion, AskScore, AskText, AskTokens, read
from trueup.inference.server.chat import Chat, usage
from trueup.inference.server.completions import Completion
from trueup.inference.server.failures import (
    ApiError,
    busy,
    not_answered,
    on_api_error,
    on_bug,
    on_http_error,
    refuse,
)
from trueup.inference.server.guard import Guard
from trueup.inference.server.served import Served
from trueup.inference.server.settings import Settings
from trueup.inference.server.turns import conversation, tools_of
from trueup.inference.server.under_way import while_wanted


class State:
    """What the routes know: the models, once they are loaded. Whoever loaded them closes them: servers may share."""

    def __init__(self, settings: Settings, served: Served | None = None) -> None:
        self.settings, self.served = settings, served

    async def loaded(self) -> Served:
        """Raises ApiError."""
        if self.served is None:
            raise busy("the model is still loading")
        return self.served

    def drain(self) -> None:
        """Take nothing new, and let what is under way end, as long as the settings say."""
        if self.served is not None and self.served.engine is not None:
            self.served.engine.close(drain=True, timeout=self.settings.limits.drain)


def make_app(state: State) -> ASGIApp:
    """The application, with its guard."""
    return Guard(make_routes(state), state.settings)


def make_routes(state: State) -> FastAPI:
    """Without the guard."""
    app = FastAPI(
        title="trueup", version=__version__, redirect_slashes=False,
        docs_url=None, redoc_url=None, openapi_url=None,
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_bug},
    )  # fmt: skip
    loaded = Depends(state.loaded)

    @app.get("/health")
    async def health() -> Response:
        if state.served is None:
            return JSONResponse({"status": "loading"}, 503, {"retry-after": "1"})
        engine = state.served.engine
        stats = {} if engine is None else {"active": engine.stats.active, "queued": engine.stats.queued}
        return JSONResponse({"status": "ok", **stats})

    @app.get("/version")
    async def version() -> Json:
        return {"version": __version__}

    @app.get("/v1/models")
    async def models(served: Served = loaded) -> Json:
        return {"object": "list", "data": [_card(served, model) for model in served.ids]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str, served: Served = loaded) -> Json:
        return _card(served, served.known(model))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, served: Served = loaded) -> Response:
        ask = read(AskChat, await request.body())
        return await Chat(served, ask).answer(request)

    @app.post("/v1/completions")
    async def completions(request: Request, served: Served = loaded) -> Response:
        ask = read(AskCompletion, await request.body())
        return await Completion(served, ask).answer(request)

    @app.post("/v1/score")
    async def score(request: Request, served: Served = loaded) -> Json:
        ask = read(AskScore, await request.body())
        served.known(ask.model)
        talks = [conversation(one) for one in ask.conversations]
        try:
            worth, tokens = await while_wanted(request, served.score(ask, talks), state.settings.limits.deadline)
        except (ValueError, RuntimeError) as error:
            raise not_answered(error) from error
        data = [{"index": index, "object": "score", **one.to_dict()} for index, one in enumerate(worth)]
        return {"object": "list", "model": ask.model, "data": data, "usage": usage(tokens, 0)}

    @app.post("/tokenize")
    async def tokenize(request: Request, served: Served = loaded) -> Json:
        ask = read(AskTokens, await request.body())
        if ask.messages is not None:
            ids = await served.prompt_ids(conversation(ask.messages), tools_of(ask.tools))
        else:
            text, special = ask.prompt or "", ask.add_special_tokens
            ids = await served.in_words(lambda: served.tokenizer(text, add_special_tokens=special)["input_ids"])
        return {"count": len(ids), "max_model_len": served.context, "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(request: Request, served: Served = loaded) -> Json:
        ask = read(AskText, await request.body())
        if ask.tokens and max(ask.tokens) >= len(served.tokenizer):
            raise refuse("tokens", f"the tokenizer has {len(served.tokenizer):,} tokens")
        skip = ask.skip_special_tokens
        text = await served.in_words(lambda: served.tokenizer.decode(ask.tokens, skip_special_tokens=skip))
        return {"prompt": text}

    return app


def _card(served: Served, model: str) -> Json:
    kind = "reward" if model in served.rewards else "generate"
    return {
        "id": model, "object": "model", "created": served.created, "owned_by": "trueup", "task": kind,
        "max_model_len": served.context,
    }  # fmt: skip
