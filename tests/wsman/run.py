#!/usr/bin/env python3
"""The WS-Management stand-in tried by independent clients: pywinrm and pypsrp, with pyspnego for NTLM and Kerberos.

    VMTIDE_STANDIN_BIN=target/debug/standin-wsman-server /usr/bin/python3 tests/wsman/run.py [WORD…]

What they see is what vmtide's own client is written against; that both were written from the same documents proves
nothing, that a third one understands the server does. Kerberos has a real KDC in a temporary directory.

Needs pywinrm, pypsrp and pyspnego (requirements.txt), python3-gssapi, krb5-kdc, krb5-admin-server, krb5-user.
The last line is `test result: ok. N passed; M failed`.
"""

import base64
import http.client
import os
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "shim")]
sys.dont_write_bytecode = True
warnings.simplefilter("ignore")

from pypsrp.exceptions import AuthenticationError, WinRMTransportError, WSManFaultError  # noqa: E402
from pypsrp.negotiate import HTTPNegotiateAuth  # noqa: E402
from pypsrp.wsman import NAMESPACES, SelectorSet, WSMan  # noqa: E402
from winrm.exceptions import InvalidCredentialsError, WinRMTransportError as PywinrmError  # noqa: E402
from winrm.protocol import Protocol  # noqa: E402
import spnego  # noqa: E402
from spnego._context import GSSMech  # noqa: E402
from spnego._spnego import NegState, NegTokenInit, NegTokenResp, pack_mech_type_list, unpack_token  # noqa: E402
import xmltodict  # noqa: E402

import envelopes as soap  # noqa: E402
from realm import CLOCK_SKEW_S, Realm  # noqa: E402
from standin import Standin  # noqa: E402

HOST = "winrm.standin.test"
USER, PASSWORD = "Jörg", "Pässw0rd €"

# Numbers of wsmerror.h.
SCHEMA_VALIDATION = 2150858817
NO_CLASS = 2150858752
PULL_NOT_SAME = 2150859181
INVALID_CONTEXT = 2150858779
WQL_NEEDS_ALL = 2150859003
TOO_LARGE = 2150858824
TIMED_OUT = 2150858793
UNEXPECTED_SELECTORS = 2150858843
ACCESS_DENIED = 5


class Failed(Exception):
    """A check that found something else than it wanted."""


def want(condition, text):
    if not condition:
        raise Failed(text)


def refused(error, action, code=None):
    """The error that an action must end with."""
    try:
        action()
    except error as found:
        want(code is None or found.code == code, f"code {getattr(found, 'code', None)} instead of {code}: {found}")
        return found
    raise Failed(f"{error.__name__} was wanted, and it went well")


class Lab:
    """The servers that all checks share, each started when it is first asked for."""

    def __init__(self, place):
        self.place = Path(place)
        self.servers = {}
        self._realm = None

    @property
    def realm(self):
        if self._realm is None:
            self._realm = Realm(self.place / "realm")
            self._realm.add_user("alice", "alice's Secret 1")
            self._realm.add_service(f"HTTP/{HOST}", self.place / "winrm.keytab")
            self._realm.add_service("HTTP/other.standin.test", self.place / "other.keytab")
            # For what runs within this process.
            for name in ("KRB5_CONFIG", "KRB5CCNAME"):
                os.environ[name] = self._realm.environment[name]
        return self._realm

    def server(self, kind):
        if kind not in self.servers:
            user = ["--user", f"{USER}:{PASSWORD}", "--user", "guest:guest:none"]
            # Clients do not agree on how Basic writes what is not ASCII.
            plain = ["--user", "plain:of:ascii"]
            tls = ["--tls", f"127.0.0.1,localhost,{HOST}"]
            words = {
                "http": [*user, "--sample", "40"],
                "lenient": [*user, "--lenient"],
                "small": [*user, "--max-envelope-kib", "16", "--sample", "40"],
                "https": [*user, *plain, *tls, "--basic", "--certificates", self.place],
                "strict384": [*user, *tls, "--channel-binding", "strict", "--tls-sha384"],
                "strict": [*user, *tls, "--channel-binding", "strict", "--lenient"],
            }
            if kind.startswith("kerberos"):
                realm = self.realm
                words["kerberos"] = ["--keytab", self.place / "winrm.keytab", "--krb5-config", realm.config]
                words["kerberos-strict"] = [*words["kerberos"], *tls, "--channel-binding", "strict"]
                words["kerberos-other"] = ["--keytab", self.place / "other.keytab", "--krb5-config", realm.config]
            self.servers[kind] = Standin(*words[kind])
            if self.servers[kind].about["authority"]:
                (self.place / f"{kind}.pem").write_text(self.servers[kind].about["authority"])
        return self.servers[kind]

    def client(self, kind, user=USER, password=PASSWORD, auth="ntlm", **more):
        """pypsrp's client of a server."""
        server = self.server(kind)
        ssl = server.url.startswith("https")
        if ssl:
            more.setdefault("cert_validation", str(self.place / f"{kind}.pem"))
        return WSMan(
            "127.0.0.1", port=server.port, username=user, password=password, ssl=ssl, auth=auth, no_proxy=True,
            connection_timeout=20, read_timeout=20, **more,
        )

    def stop(self):
        for server in self.servers.values():
            server.__exit__()
        if self._realm is not None:
            self._realm.stop()


def get(client, number=3):
    selectors = SelectorSet()
    selectors.add_option("InstanceID", soap.disk_id(number))
    return client.get(soap.DISK, selector_set=selectors)[0]


def text(element, name, namespace=soap.DISK):
    return [child.text for child in element.findall(f"{{{namespace}}}{name}")]


def want_disk(element, number=3):
    want(element.tag == f"{{{soap.DISK}}}Sample_Disk", element.tag)
    want(element.get(f"{{{soap.XSI}}}type") == "p:Sample_Disk_Type", "no xsi:type")
    want(text(element, "InstanceID") == [soap.disk_id(number)], "InstanceID")
    want(text(element, "Size") == [str(number << 40)], "Size")
    want(text(element, "Enabled") == ["false" if number % 2 else "true"], "Enabled")
    want(text(element, "Tags") == ["<first>", "zweites & drittes", "日本語"], "Tags")
    want(text(element, "Offsets") == [str(2**64 - 1)], "Offsets")
    created = element.find(f"{{{soap.DISK}}}Created")
    want(created[0].text == "2026-11-21T12:00:00Z", f"Created {created[0].text}")
    parent = element.find(f"{{{soap.DISK}}}Parent")
    selectors = parent.findall(f".//{{{soap.WSMAN}}}Selector")
    want({selector.get("Name"): selector.text for selector in selectors}
         == {"InstanceID": soap.disk_id(number - 1), "__cimnamespace": "root/virtualization/v2"}, "Parent")


# ---------------------------------------------------------------------------------------------- who is it


def check_ntlm_sealed(lab):
    """pypsrp over HTTP: NTLM, every message sealed."""
    client = lab.client("http")
    for number in range(1, 5):
        want_disk(get(client, number), number)
    last = lab.server("http").last()
    want((last["how"], last["user"], last["sealed"]) == ("NTLM", USER, True), str(last))


def check_spnego_ntlm_sealed(lab):
    """pypsrp over HTTP: NTLM within SPNEGO, with signatures over the mechanisms, then sealed."""
    client = lab.client("http", auth="negotiate")
    for number in range(1, 5):
        want_disk(get(client, number), number)
    last = lab.server("http").last()
    want((last["how"], last["sealed"]) == ("NTLM", True), str(last))


def check_spnego_turns_to_ntlm(lab):
    """A client that would rather have Kerberos is turned to NTLM by a host that has none."""
    connection = http.client.HTTPConnection("127.0.0.1", lab.server("http").port, timeout=20)

    def send(token):
        login = base64.b64encode(token.pack()).decode()
        connection.request("POST", "/wsman", b"", {"Authorization": f"Negotiate {login}"})
        answer = connection.getresponse()
        answer.read()
        scheme, text = answer.headers["WWW-Authenticate"].split(" ")
        want(scheme == "Negotiate", scheme)
        return answer.status, unpack_token(base64.b64decode(text))

    mechanisms = [GSSMech.kerberos.value, GSSMech.ntlm.value]
    client = spnego.client(USER, PASSWORD, protocol="ntlm", options=spnego.NegotiateOptions.use_ntlm)
    status, answer = send(NegTokenInit(mechanisms, mech_token=b"a token of Kerberos"))
    want((status, answer.neg_state, answer.supported_mech) == (401, NegState.request_mic, mechanisms[1]), str(answer))
    status, answer = send(NegTokenResp(response_token=client.step()))
    want(status == 401 and answer.response_token.startswith(b"NTLMSSP"), str(answer))
    last = client.step(answer.response_token)
    signed = pack_mech_type_list(mechanisms)
    status, answer = send(NegTokenResp(response_token=last, mech_list_mic=client.sign(signed)))
    want((status, answer.neg_state) == (200, NegState.accept_complete), f"{status} {answer}")
    client.verify(signed, answer.mech_list_mic)


def check_spnego_without_signature(lab):
    """A list of mechanisms that nobody signed may have been changed on the way: no login."""
    connection = http.client.HTTPConnection("127.0.0.1", lab.server("http").port, timeout=20)
    client = spnego.client(USER, PASSWORD, protocol="ntlm", options=spnego.NegotiateOptions.use_ntlm)
    token = NegTokenInit([GSSMech.ntlm.value], mech_token=client.step())
    for status in (401, 401):
        login = base64.b64encode(token.pack()).decode()
        connection.request("POST", "/wsman", b"", {"Authorization": f"Negotiate {login}"})
        answer = connection.getresponse()
        answer.read()
        want(answer.status == status, f"status {answer.status}")
        text = answer.headers["WWW-Authenticate"]
        if text != "Negotiate":
            challenge = unpack_token(base64.b64decode(text.split(" ")[1]))
            token = NegTokenResp(response_token=client.step(challenge.response_token))
    want("has none over its mechanisms" in lab.server("http").last()["reason"], "another reason")


def check_domain_and_case(lab):
    """A domain before the name, and the name in another case, are the same user."""
    for name in (f"STANDIN\\{USER}", USER.upper(), f".\\{USER}"):
        want_disk(get(lab.client("http", user=name)))


def pywinrm(lab, kind, transport="ntlm", password=PASSWORD, **more):
    server = lab.server(kind)
    if server.about["authority"]:
        more.setdefault("ca_trust_path", str(lab.place / f"{kind}.pem"))
    return Protocol(server.url, transport=transport, username=USER, password=password, proxy=None, **more)


def pywinrm_send(protocol, resource, action, body, selectors=None):
    # pywinrm has no public call for requests that are not of its shells.
    header = protocol._get_soap_header(resource_uri=resource, action=action)
    header["env:Header"]["w:SelectorSet"] = {
        "w:Selector": [{"@Name": name, "#text": value} for name, value in (selectors or {}).items()]
    }
    if not selectors:
        del header["env:Header"]["w:SelectorSet"]
    answer = protocol.send_message(xmltodict.unparse({"env:Envelope": {**header, "env:Body": body}}))
    return ET.fromstring(answer).find(f"{{{soap.SOAP}}}Body")[0]


def check_pywinrm_ntlm_sealed(lab):
    """pywinrm over HTTP: bare NTLM, sealed; an enumeration in parts."""
    protocol = pywinrm(lab, "lenient", message_encryption="always")
    body = {"n:Enumerate": {"w:Filter": {"@Dialect": soap.WQL, "#text": "SELECT * FROM Sample_Disk"}}}
    body["n:Enumerate"]["@xmlns:n"] = soap.ENUMERATION
    answer = pywinrm_send(protocol, soap.ALL, soap.ENUMERATION + "/Enumerate", body)
    context = answer.find(f"{{{soap.ENUMERATION}}}EnumerationContext").text
    seen = []
    while context:
        pull = {"@xmlns:n": soap.ENUMERATION, "n:EnumerationContext": context, "n:MaxElements": "3"}
        answer = pywinrm_send(protocol, soap.ALL, soap.ENUMERATION + "/Pull", {"n:Pull": pull})
        seen += [text(item, "InstanceID")[0] for item in answer.find(f"{{{soap.ENUMERATION}}}Items")]
        found = answer.find(f"{{{soap.ENUMERATION}}}EnumerationContext")
        context = None if found is None else found.text
    want(seen == [soap.disk_id(number) for number in range(10)], str(seen))
    last = lab.server("lenient").last()
    want((last["how"], last["sealed"]) == ("NTLM", True), str(last))


def check_pywinrm_channel_binding(lab):
    """pywinrm over HTTPS where logins must be bound to TLS."""
    protocol = pywinrm(lab, "strict")
    answer = pywinrm_send(
        protocol, soap.DISK, "http://schemas.xmlsoap.org/ws/2004/09/transfer/Get", {}, {"InstanceID": soap.disk_id(3)}
    )
    want_disk(answer)
    refused(
        InvalidCredentialsError,
        lambda: pywinrm_send(pywinrm(lab, "strict", send_cbt=False), soap.DISK, "urn:x", {}),
    )
    reasons = [entry["reason"] for entry in lab.server("strict").log()]
    want("the login is not bound to its TLS connection" in reasons, str(reasons))


def check_pypsrp_channel_binding(lab):
    """pypsrp over HTTPS with bindings, and messages sealed within TLS too."""
    want_disk(get(lab.client("strict", auth="negotiate")))
    want_disk(get(lab.client("strict384", auth="negotiate")))
    want_disk(get(lab.client("strict", encryption="always")))
    want(lab.server("strict").last()["sealed"], "not sealed")
    refused(AuthenticationError, lambda: get(lab.client("strict", negotiate_send_cbt=False)))


def check_basic_over_tls(lab):
    """Basic over HTTPS; a wrong password; a certificate that is not trusted."""
    want_disk(get(lab.client("https", user="plain", password="of:ascii", auth="basic")))
    want(lab.server("https").last()["how"] == "Basic", "not Basic")
    refused(AuthenticationError, lambda: get(lab.client("https", user="plain", password="wrong", auth="basic")))
    untrusted = lab.client("https", auth="basic", user="plain", password="of:ascii", cert_validation=True)
    found = refused(Exception, lambda: get(untrusted))
    want("CERTIFICATE_VERIFY_FAILED" in str(found), str(found))


def check_basic_over_http(lab):
    """Basic without TLS is not offered, and refused where it is tried."""
    connection = http.client.HTTPConnection("127.0.0.1", lab.server("http").port, timeout=20)
    login = base64.b64encode(b"guest:guest").decode()
    connection.request("POST", "/wsman", b"", {"Authorization": f"Basic {login}"})
    answer = connection.getresponse()
    offers = answer.headers.get_all("WWW-Authenticate")
    want(answer.status == 401 and offers == ["Negotiate"], f"{answer.status} {offers}")


def check_certificate(lab):
    """A client's certificate logs its user in."""
    place = lab.place
    lab.server("https")
    client = lab.client(
        "https", auth="certificate", certificate_pem=str(place / "client.pem"),
        certificate_key_pem=str(place / "client.key"),
    )
    want_disk(get(client))
    last = lab.server("https").last()
    want((last["how"], last["user"]) == ("Certificate", USER), str(last))


def check_wrong_password(lab):
    """A wrong password is 401 for every client, and nothing is done."""
    for auth in ("ntlm", "negotiate"):
        refused(AuthenticationError, lambda auth=auth: get(lab.client("http", password="wrong", auth=auth)))
    refused(AuthenticationError, lambda: get(lab.client("http", user="nobody")))
    refused(InvalidCredentialsError, lambda: pywinrm(lab, "lenient", password="wrong").send_message("<x/>"))
    want(lab.server("http").last()["reason"] == "there is no user 'nobody'".replace("'", '"'), "reason")


def check_no_rights(lab):
    """A user without rights logs in, and is denied everything."""
    client = lab.client("http", user="guest", password="guest")
    refused(WSManFaultError, lambda: get(client), ACCESS_DENIED)
    refused(WSManFaultError, lambda: enumerate_all(client, "SELECT * FROM Sample_Disk", 5), ACCESS_DENIED)


def check_not_sealed(lab):
    """A message over HTTP that is not sealed is refused without a word."""
    found = refused(WinRMTransportError, lambda: get(lab.client("http", encryption="never")))
    want(found.code == 500 and not found.response_text, str(found))


def check_changed_on_the_way(lab):
    """A sealed message of which one bit was changed is not carried out."""
    client = lab.client("http")
    want_disk(get(client))
    encryption = client.transport.encryption
    wrap = encryption.wrap_message

    def spoil(message):
        kind, body = wrap(message)
        return kind, body[:-40] + bytes([body[-40] ^ 1]) + body[-39:]

    encryption.wrap_message = spoil
    before = lab.server("http").log()
    refused(WinRMTransportError, lambda: get(client), 400)
    after = lab.server("http").log()[len(before):]
    want([entry["operation"] for entry in after] == [None], str(after))


# ---------------------------------------------------------------------------------------------- Kerberos


def check_kerberos_sealed(lab):
    """Kerberos from a real KDC over HTTP, sealed."""
    lab.realm.login("alice", "alice's Secret 1")
    client = lab.client("kerberos", None, None, "kerberos", negotiate_hostname_override=HOST, negotiate_service="HTTP")
    for number in range(1, 5):
        want_disk(get(client, number), number)
    last = lab.server("kerberos").last()
    want((last["how"], last["user"], last["sealed"]) == ("Kerberos", "alice@STANDIN.TEST", True), str(last))


def check_kerberos_in_spnego(lab):
    """Kerberos within SPNEGO, beside NTLM in the list of mechanisms."""
    lab.realm.login("alice", "alice's Secret 1")
    client = lab.client("kerberos", None, None, "negotiate", negotiate_hostname_override=HOST, negotiate_service="HTTP")
    for number in range(1, 4):
        want_disk(get(client, number), number)
    want(lab.server("kerberos").last()["how"] == "Kerberos", "not Kerberos")


def check_kerberos_scheme(lab):
    """Kerberos by its own scheme, with the protocol that belongs to it."""
    lab.realm.login("alice", "alice's Secret 1")
    client = lab.client("kerberos", None, None, "kerberos", negotiate_hostname_override=HOST, negotiate_service="HTTP")
    offered = HTTPNegotiateAuth._check_auth_supported
    try:
        # The host offers both schemes; pypsrp takes Kerberos only where there is no Negotiate.
        HTTPNegotiateAuth._check_auth_supported = staticmethod(lambda response, providers: "Kerberos")
        for number in range(1, 4):
            want_disk(get(client, number), number)
    finally:
        HTTPNegotiateAuth._check_auth_supported = staticmethod(offered)
    want(client.transport.encryption.protocol == client.transport.encryption.KERBEROS, "another protocol")
    want(lab.server("kerberos").last()["sealed"], "not sealed")


def check_slow(lab):
    """An answer in small pieces with pauses is put together."""
    lab.server("http").tell("slow:get:0:1")
    want_disk(get(lab.client("http")))


def check_kerberos_channel_binding(lab):
    """Kerberos over HTTPS, bound to TLS."""
    lab.realm.login("alice", "alice's Secret 1")
    more = {"negotiate_hostname_override": HOST, "negotiate_service": "HTTP"}
    want_disk(get(lab.client("kerberos-strict", None, None, "kerberos", **more)))
    more["negotiate_send_cbt"] = False
    refused(AuthenticationError, lambda: get(lab.client("kerberos-strict", None, None, "kerberos", **more)))
    reason = lab.server("kerberos-strict").last()["reason"]
    want("not bound to its TLS connection" in reason, reason)


def check_kerberos_wrong_service(lab):
    """A ticket for a service whose key the host has not is refused."""
    lab.realm.login("alice", "alice's Secret 1")
    more = {"negotiate_hostname_override": HOST, "negotiate_service": "HTTP"}
    refused(AuthenticationError, lambda: get(lab.client("kerberos-other", None, None, "kerberos", **more)))
    reason = lab.server("kerberos-other").last()["reason"]
    want(reason.startswith("Kerberos: "), reason)


def check_kerberos_wrong_password(lab):
    """The KDC refuses a wrong password; without a ticket there is no login."""
    done = lab.realm.login("alice", "wrong")
    want(done.returncode != 0 and "Password incorrect" in done.stderr, done.stderr)
    more = {"negotiate_hostname_override": HOST, "negotiate_service": "HTTP"}
    refused(Exception, lambda: get(lab.client("kerberos", None, None, "kerberos", **more)))


def check_kerberos_expired(lab):
    """A token of a ticket that has expired since is refused by the host."""
    lab.server("kerberos")
    done = lab.realm.login("alice", "alice's Secret 1", life="4s")
    want(done.returncode == 0, done.stderr)
    client = spnego.client(hostname=HOST, service="HTTP", protocol="kerberos")
    token = base64.b64encode(client.step()).decode()
    time.sleep(5 + CLOCK_SKEW_S)
    connection = http.client.HTTPConnection("127.0.0.1", lab.server("kerberos").port, timeout=20)
    connection.request("POST", "/wsman", b"", {"Authorization": f"Kerberos {token}"})
    answer = connection.getresponse()
    want(answer.status == 401, f"status {answer.status}")
    reason = lab.server("kerberos").last()["reason"]
    want("xpired" in reason, reason)


# ---------------------------------------------------------------------------------------------- what is asked


def enumerate_all(client, wql, count, resource=soap.ALL, pull_resource=None):
    """All items of a query, and in how many parts they came."""
    answer = client.enumerate(resource, soap.enumerate_wql(wql))[0]
    context = answer.find(f"{{{soap.ENUMERATION}}}EnumerationContext").text
    found, parts = [], 0
    while True:
        answer = client.pull(pull_resource or resource, soap.pull(context, count))[0]
        parts += 1
        found += list(answer.find(f"{{{soap.ENUMERATION}}}Items"))
        if answer.find(f"{{{soap.ENUMERATION}}}EndOfSequence") is not None:
            return found, parts
        context = answer.find(f"{{{soap.ENUMERATION}}}EnumerationContext").text


def check_enumerate(lab):
    """A query in parts of the size that was asked for."""
    found, parts = enumerate_all(lab.client("http"), "SELECT * FROM Sample_Disk", 7)
    want(len(found) == 40 and parts == 6, f"{len(found)} in {parts}")
    for number in range(1, 40):
        want_disk(found[number], number)


def check_enumerate_optimized(lab):
    """The first part with the answer to Enumerate; all of it where it is short."""
    client = lab.client("http")
    answer = client.enumerate(soap.ALL, soap.enumerate_wql("SELECT * FROM Sample_Disk", optimize=3))[0]
    want(len(answer.find(f"{{{soap.WSMAN}}}Items")) == 3, "not 3 items")
    want(answer.find(f"{{{soap.WSMAN}}}EndOfSequence") is None, "the end too early")
    answer = client.enumerate(soap.ALL, soap.enumerate_wql("SELECT * FROM Sample_Service", optimize=3))[0]
    want(len(answer.find(f"{{{soap.WSMAN}}}Items")) == 1, "not 1 item")
    want(answer.find(f"{{{soap.WSMAN}}}EndOfSequence") is not None, "no end")


def check_enumerate_references(lab):
    """Objects together with their references; columns alone as fragments."""
    client = lab.client("http")
    body = soap.enumerate_wql("SELECT * FROM Sample_Disk", optimize=2, mode="EnumerateObjectAndEPR")
    items = client.enumerate(soap.ALL, body)[0].find(f"{{{soap.WSMAN}}}Items")
    want_disk_pair = items[1]
    want(want_disk_pair.tag == f"{{{soap.WSMAN}}}Item", want_disk_pair.tag)
    want_disk(want_disk_pair[0], 1)
    reference = want_disk_pair[1].find(f".//{{{soap.WSMAN}}}ResourceURI").text
    want(reference == soap.DISK, reference)
    found, _ = enumerate_all(client, "SELECT InstanceID,Size FROM Sample_Disk", 100)
    want(found[0].tag == f"{{{soap.WSMAN}}}XmlFragment" and len(found[0]) == 2, found[0].tag)


def check_batches_fit(lab):
    """Parts are as large as the envelope allows, and an object that does not fit is a fault."""
    client = lab.client("http", max_envelope_size=8192)
    found, parts = enumerate_all(client, "SELECT * FROM Sample_Disk", 1000)
    want(len(found) == 40 and 8 <= parts <= 40, f"{len(found)} in {parts}")
    found, parts = enumerate_all(lab.client("small"), "SELECT * FROM Sample_Disk", 1000)
    want(len(found) == 40 and parts > 3, f"{len(found)} in {parts}")


def check_pull_needs_the_same_uri(lab):
    """Pull with another resource URI than Enumerate's is a fault."""
    client = lab.client("http")
    refused(
        WSManFaultError,
        lambda: enumerate_all(client, "SELECT * FROM Sample_Disk", 5, pull_resource=soap.DISK),
        PULL_NOT_SAME,
    )


def check_enumeration_faults(lab):
    """Unknown contexts and classes, a query with a class in the URI, a query that cannot be read."""
    client = lab.client("http")
    unknown = soap.pull("uuid:11111111-2222-3333-4444-555555555555", 1)
    refused(WSManFaultError, lambda: client.pull(soap.ALL, unknown), INVALID_CONTEXT)
    refused(WSManFaultError, lambda: enumerate_all(client, "SELECT * FROM Sample_Nothing", 5), NO_CLASS)
    refused(WSManFaultError, lambda: enumerate_all(client, "SELECT * FROM Sample_Disk", 5, soap.DISK), WQL_NEEDS_ALL)
    found = refused(WSManFaultError, lambda: enumerate_all(client, "DELETE Sample_Disk", 5))
    want(found.provider == "WMI Provider", str(found))
    lab.server("http").tell("expired-enumeration:pull:1:1")
    refused(WSManFaultError, lambda: enumerate_all(client, "SELECT * FROM Sample_Disk", 5), INVALID_CONTEXT)


def check_associations(lab):
    """The filter that follows associations."""
    client = lab.client("http")
    keys = {"CreationClassName": "Sample_Service", "Name": "sample"}
    answer = client.enumerate(soap.ALL, soap.enumerate_associated(soap.SERVICE, keys, "Sample_Disk"))[0]
    context = answer.find(f"{{{soap.ENUMERATION}}}EnumerationContext").text
    items = client.pull(soap.ALL, soap.pull(context, 100))[0].find(f"{{{soap.ENUMERATION}}}Items")
    want(len(items) == 40, str(len(items)))


def check_get_faults(lab):
    """Objects that are not there, and selectors that are no keys."""
    client = lab.client("http")
    refused(WSManFaultError, lambda: get(client, 4711), NO_CLASS)
    selectors = SelectorSet()
    selectors.add_option("Size", "1")
    refused(WSManFaultError, lambda: client.get(soap.DISK, selector_set=selectors), UNEXPECTED_SELECTORS)


def call(client, name, parameters, resource=soap.SERVICE, body=None):
    selectors = SelectorSet()
    selectors.add_option("CreationClassName", "Sample_Service")
    body = soap.method(resource, name, parameters) if body is None else body
    return client.invoke(f"{resource}/{name}", resource, body, selector_set=selectors).find("s:Body", NAMESPACES)[0]


def check_invoke(lab):
    """A method with every kind of parameter, named by a part of its service's keys."""
    settings = "<INSTANCE CLASSNAME=\"X\"><PROPERTY NAME=\"ä\"><VALUE>]]>&amp;</VALUE></PROPERTY></INSTANCE>"
    given = [
        ("Disk", soap.a_disk(7)), ("Settings", settings), ("Kind", "32768"), ("Offsets", "1"),
        ("Offsets", "18446744073709551615"), ("Flag", "true"),
    ]
    answer = call(lab.client("http"), "Echo", given)
    want(answer.tag == f"{{{soap.SERVICE}}}Echo_OUTPUT", answer.tag)
    out = lambda name: text(answer, name, soap.SERVICE)  # noqa: E731
    want(out("ReturnValue") == ["4096"] and out("Kind") == ["32768"] and out("Flag") == ["true"], "values")
    want(out("Settings") == [settings] and out("Offsets") == ["1", "18446744073709551615"], "values")
    job = answer.find(f"{{{soap.SERVICE}}}Job")
    want(job.get(f"{{{soap.XSI}}}nil") == "true", "Job is not nil")
    selector = answer.find(f"{{{soap.SERVICE}}}Disk//{{{soap.WSMAN}}}Selector[@Name='InstanceID']")
    want(selector.text == soap.disk_id(7), selector.text)


def check_invoke_is_strict(lab):
    """Order, case, names, types and forms of parameters are those of the schema, or it is a fault."""
    client = lab.client("http")
    disk = ("Disk", soap.a_disk(1))

    def tree(element):
        ET.SubElement(element, f"{{{soap.NAMESPACE}X}}Name").text = "as elements"

    wrong = {
        "order": [("Kind", "1"), disk],
        "case": [disk, ("kind", "1")],
        "unknown": [disk, ("More", "1")],
        "missing": [("Kind", "1")],
        "type": [disk, ("Kind", "65536")],
        "truth": [disk, ("Flag", "TRUE")],
        "twice": [disk, ("Kind", "1"), ("Kind", "2")],
        "apart": [disk, ("Offsets", "1"), ("Flag", "true"), ("Offsets", "2")],
        "elements": [disk, ("Settings", tree)],
        "reference": [("Disk", "Sample_Disk.InstanceID='x'")],
    }
    for name, parameters in wrong.items():
        try:
            refused(WSManFaultError, lambda p=parameters: call(client, "Echo", p), SCHEMA_VALIDATION)
        except Failed as found:
            raise Failed(f"{name}: {found}") from None
    refused(WSManFaultError, lambda: call(client, "echo", [disk]))
    other = soap.method(soap.DISK, "Echo", [disk])
    refused(WSManFaultError, lambda: call(client, "Echo", [], body=other), SCHEMA_VALIDATION)


def count(client):
    return int(text(call(client, "Count", []), "Calls", soap.SERVICE)[0])


def check_switches(lab):
    """Faults that are switched on, as a client sees them, and whether the method ran."""
    server, client = lab.server("http"), lab.client("http")
    calls = count(client)
    for effect, ran in (("cut-before", 0), ("cut-after", 1), ("cut-during", 1), ("empty-error", 0), ("timed-out", 1),
                        ("garbage", 1), ("unauthorized", 0), ("access-denied", 0), ("unavailable", 0)):
        server.tell(f"{effect}:invoke:0:1")
        refused(Exception, lambda: count(lab.client("http")))
        now = count(lab.client("http"))
        want(now == calls + ran + 1, f"{effect}: {now - calls - 1} calls instead of {ran}")
        calls = now
    server.tell("timed-out:get:0:1")
    refused(WSManFaultError, lambda: get(lab.client("http")), TIMED_OUT)


def check_config(lab):
    """The limit on envelopes can be asked for."""
    client = lab.client("http")
    client.update_max_payload_size()
    want(client.max_envelope_size == 500 * 1024, str(client.max_envelope_size))


def check_identify(lab):
    """Identify of somebody who is not logged in tells no version."""
    body = (
        f'<s:Envelope xmlns:s="{soap.SOAP}" '
        'xmlns:i="http://schemas.dmtf.org/wbem/wsman/identity/1/wsmanidentity.xsd">'
        "<s:Header/><s:Body><i:Identify/></s:Body></s:Envelope>"
    )
    connection = http.client.HTTPConnection("127.0.0.1", lab.server("http").port, timeout=20)
    headers = {"Content-Type": "application/soap+xml;charset=UTF-8", "WSMANIDENTIFY": "unauthenticated"}
    connection.request("POST", "/wsman", body.encode(), headers)
    answer = connection.getresponse()
    found = answer.read().decode()
    want(answer.status == 200 and "OS: 0.0.0 SP: 0.0 Stack: 3.0" in found, found)


def main():
    words = sys.argv[1:]
    checks = [(name[6:], check) for name, check in globals().items() if name.startswith("check_")]
    checks = [(name, check) for name, check in checks if not words or any(word in name for word in words)]
    good, bad = 0, 0
    with tempfile.TemporaryDirectory(prefix="vmtide-wsman-") as place:
        lab = Lab(place)
        try:
            for name, check in checks:
                try:
                    check(lab)
                    good += 1
                    print(f"    {name}: ok", flush=True)
                except Exception as error:  # every check runs, whatever the one before found
                    bad += 1
                    print(f"    {name}: FAILED: {error}", flush=True)
                    if not isinstance(error, Failed):
                        traceback.print_exc()
        finally:
            lab.stop()
    print(f"test result: {'FAILED' if bad else 'ok'}. {good} passed; {bad} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
