"""The server's side of Kerberos for the stand-in: MIT's GSSAPI, driven over standard input and output.

One JSON object a line comes in, one goes out. Keys and realm come from KRB5_KTNAME and KRB5_CONFIG. Tokens are
SPNEGO or plain Kerberos, whichever the client sends: the library takes both.
"""

import base64
import json
import sys

try:
    import gssapi
    from gssapi import raw
except ImportError as error:
    sys.exit(f"Python's gssapi is missing ({error}): install the package python3-gssapi")

# GSS_C_CHANNEL_BOUND_FLAG: the client sent bindings, and they were right.
CHANNEL_BOUND = 0x800

contexts = {}


def decode(text):
    return base64.b64decode(text)


def encode(data):
    return base64.b64encode(data).decode()


def step(request):
    context = contexts.get(request["id"])
    if context is None:
        bindings = None
        if request.get("binding"):
            bindings = raw.ChannelBindings(application_data=decode(request["binding"]))
        context = gssapi.SecurityContext(usage="accept", channel_bindings=bindings)
        contexts[request["id"]] = context
    token = context.step(decode(request["token"]))
    answer = {"done": context.complete, "token": encode(token) if token else None}
    if context.complete:
        answer["user"] = str(context.initiator_name)
        flags = raw.inquire_context(context, flags=True).flags
        answer["sealed"] = gssapi.RequirementFlag.confidentiality in flags
        answer["bound"] = CHANNEL_BOUND & int(flags) != 0
    return answer


def wrap(request):
    # WinRM sends the header apart from the data, which has the length of the plain text: the form of SSPI.
    iov = raw.IOV(raw.IOVBufferType.header, decode(request["data"]), raw.IOVBufferType.padding, std_layout=False)
    raw.wrap_iov(contexts[request["id"]], iov, confidential=True)
    header, data, padding = (buffer.value or b"" for buffer in iov)
    return {"header": encode(header), "data": encode(data + padding), "padding": len(padding)}


def unwrap(request):
    data = decode(request["header"]) + decode(request["data"])
    plain, encrypted, _qop = raw.unwrap(contexts[request["id"]], data)
    if not encrypted:
        raise ValueError("the message is signed but not encrypted")
    return {"data": encode(plain)}


def forget(request):
    contexts.pop(request["id"], None)
    return {}


OPERATIONS = {"step": step, "wrap": wrap, "unwrap": unwrap, "forget": forget}

for line in sys.stdin:
    try:
        request = json.loads(line)
        answer = OPERATIONS[request["op"]](request)
    except Exception as error:  # whatever the library says of a token is an answer
        answer = {"error": str(error).replace("\n", " ")}
    print(json.dumps(answer), flush=True)
