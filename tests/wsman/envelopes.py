"""What is asked of the sample world, as elements of XML for pypsrp and as dictionaries for pywinrm."""

import xml.etree.ElementTree as ET

SOAP = "http://www.w3.org/2003/05/soap-envelope"
ADDRESSING = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
WSMAN = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd"
ENUMERATION = "http://schemas.xmlsoap.org/ws/2004/09/enumeration"
BINDING = "http://schemas.dmtf.org/wbem/wsman/1/cimbinding.xsd"
XSI = "http://www.w3.org/2001/XMLSchema-instance"
ANONYMOUS = ADDRESSING + "/role/anonymous"
WQL = "http://schemas.microsoft.com/wbem/wsman/1/WQL"
ASSOCIATIONS = "http://schemas.dmtf.org/wbem/wsman/1/cimbinding/associationFilter"

NAMESPACE = "http://schemas.microsoft.com/wbem/wsman/1/wmi/root/virtualization/v2/"
ALL = NAMESPACE + "*"
DISK = NAMESPACE + "Sample_Disk"
SERVICE = NAMESPACE + "Sample_Service"
LINK = NAMESPACE + "Sample_ServiceDisk"


def disk_id(number):
    return f"Sample:disk\\{number}"


def enumerate_wql(wql, optimize=None, mode=None):
    """The body of an enumeration by WQL."""
    body = ET.Element(f"{{{ENUMERATION}}}Enumerate")
    if optimize is not None:
        ET.SubElement(body, f"{{{WSMAN}}}OptimizeEnumeration")
        ET.SubElement(body, f"{{{WSMAN}}}MaxElements").text = str(optimize)
    ET.SubElement(body, f"{{{WSMAN}}}Filter", Dialect=WQL).text = wql
    if mode:
        ET.SubElement(body, f"{{{WSMAN}}}EnumerationMode").text = mode
    return body


def enumerate_associated(resource, selectors, result_class):
    body = ET.Element(f"{{{ENUMERATION}}}Enumerate")
    filter_ = ET.SubElement(body, f"{{{WSMAN}}}Filter", Dialect=ASSOCIATIONS)
    inner = ET.SubElement(filter_, f"{{{BINDING}}}AssociatedInstances")
    reference(ET.SubElement(inner, f"{{{BINDING}}}Object"), resource, selectors)
    ET.SubElement(inner, f"{{{BINDING}}}AssociationClassName").text = "Sample_ServiceDisk"
    ET.SubElement(inner, f"{{{BINDING}}}ResultClassName").text = result_class
    return body


def pull(context, count):
    body = ET.Element(f"{{{ENUMERATION}}}Pull")
    ET.SubElement(body, f"{{{ENUMERATION}}}EnumerationContext").text = context
    ET.SubElement(body, f"{{{ENUMERATION}}}MaxElements").text = str(count)
    return body


def reference(element, resource, selectors):
    """Fills an element with an endpoint reference."""
    ET.SubElement(element, f"{{{ADDRESSING}}}Address").text = ANONYMOUS
    parameters = ET.SubElement(element, f"{{{ADDRESSING}}}ReferenceParameters")
    ET.SubElement(parameters, f"{{{WSMAN}}}ResourceURI").text = resource
    set_ = ET.SubElement(parameters, f"{{{WSMAN}}}SelectorSet")
    for name, value in selectors.items():
        ET.SubElement(set_, f"{{{WSMAN}}}Selector", Name=name).text = value
    return element


def method(resource, name, parameters):
    """The body of a call; parameters are (name, text) or (name, function that fills the element)."""
    body = ET.Element(f"{{{resource}}}{name}_INPUT")
    for key, value in parameters:
        element = ET.SubElement(body, f"{{{resource}}}{key}")
        if callable(value):
            value(element)
        else:
            element.text = value
    return body


def a_disk(number):
    return lambda element: reference(element, DISK, {"InstanceID": disk_id(number)})
