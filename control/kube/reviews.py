"""Token reviews and access reviews: whose token this is, and what a user may do."""

from __future__ import annotations

from collections.abc import Sequence

from control.kube.client import Client
from control.kube.objects import (
    AccessReviewSpec,
    ResourceAttributes,
    SubjectAccessReview,
    TokenReview,
    TokenReviewSpec,
    UserInfo,
)
from control.kube.resources import ACCESS_REVIEWS, TOKEN_REVIEWS


async def review_token(client: Client, token: str, audience: str) -> UserInfo | None:
    """The user of a token. None: the token is not valid, or not for `audience`. Raises KubeError.

    A server that does not support audiences returns none. The token may then be for any audience,
    so it is refused.
    """
    review = TokenReview(spec=TokenReviewSpec(token, (audience,)))
    answer = await client.create(TOKEN_REVIEWS, review, stored=False)
    status = answer.status
    valid = (
        status.authenticated
        and not status.error
        and audience in (status.audiences or ())
        and bool(status.user.username)
    )
    return status.user if valid else None


async def may(client: Client, user: UserInfo, attributes: ResourceAttributes) -> bool:
    """Whether `user` is allowed to do `attributes`. Raises KubeError."""
    spec = AccessReviewSpec(attributes, user.username, user.groups, user.uid, user.extra)
    answer = await client.create(ACCESS_REVIEWS, SubjectAccessReview(spec=spec), stored=False)
    return answer.status.allowed and not answer.status.denied


def service_account(user: UserInfo) -> tuple[str, str] | None:
    """Namespace and name of a service account. None: the user is not a service account."""
    parts: Sequence[str] = user.username.split(":")
    if (
        len(parts) == 4
        and parts[0] == "system"
        and parts[1] == "serviceaccount"
        and parts[2]
        and parts[3]
    ):
        return parts[2], parts[3]
    return None
