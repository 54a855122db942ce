"""The stack around Django, which knows no lifespan. uvicorn --lifespan off examples.django_app:app"""

from collections.abc import AsyncIterator

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.http import require_safe

from examples.one_stack import POLICIES
from sigil_policy import PolicyStack

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])


async def hello(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"hello": "world"})


async def report(request: HttpRequest, number: int) -> JsonResponse:
    return JsonResponse({"share": 100 / number})


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        for part in (b"one ", b"two ", b"three"):
            yield part

    return StreamingHttpResponse(parts())


urlpatterns = [path("", hello), path("reports/<int:number>", require_safe(report)), path("stream", stream)]

app = PolicyStack(get_asgi_application(), POLICIES)
