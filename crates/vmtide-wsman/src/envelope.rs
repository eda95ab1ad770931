//! Requests: SOAP envelopes as WS-Management hosts take them (DSP0226, MS-WSMV 2.2.4 and 4.1).
//!
//! Hosts validate what they get: the headers below are all that they want, every name and value is checked
//! before it is written, and the parameters of a method come in the order of its schema.

use crate::xml;
use std::fmt::Write;
use std::time::Duration;
use vmtide_cim::{Association, CimError, CimValue, ObjectPath, Result};

const SOAP: &str = "http://www.w3.org/2003/05/soap-envelope";
const ADDRESSING: &str = "http://schemas.xmlsoap.org/ws/2004/08/addressing";
const ANONYMOUS: &str = "http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous";
const MANAGEMENT: &str = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd";
const ENUMERATION: &str = "http://schemas.xmlsoap.org/ws/2004/09/enumeration";
const TRANSFER: &str = "http://schemas.xmlsoap.org/ws/2004/09/transfer";
const BINDING: &str = "http://schemas.dmtf.org/wbem/wsman/1/cimbinding.xsd";
const CIM: &str = "http://schemas.dmtf.org/wbem/wscim/1/common";
const INSTANCE: &str = "http://www.w3.org/2001/XMLSchema-instance";
const WQL_DIALECT: &str = "http://schemas.microsoft.com/wbem/wsman/1/WQL";
const ASSOCIATION_DIALECT: &str =
    "http://schemas.dmtf.org/wbem/wsman/1/cimbinding/associationFilter";

/// Where the classes of WMI live among the resources of a host.
const WMI: &str = "http://schemas.microsoft.com/wbem/wsman/1/wmi/";

/// Instances in one answer of an enumeration, as many as Windows' own client asks for. A settings object has
/// some 6 KB: more of them would meet the limit of 150 KB on envelopes before they meet this one.
const MAX_ELEMENTS: u32 = 20;

/// The only request that is no operation on a resource: who are you?
pub(crate) fn identify() -> String {
    format!(
        "<s:Envelope xmlns:s=\"{SOAP}\" xmlns:i=\"http://schemas.dmtf.org/wbem/wsman/identity/1/wsmanidentity.xsd\">\
         <s:Header/><s:Body><i:Identify/></s:Body></s:Envelope>"
    )
}

/// What every request says, whatever it asks.
#[derive(Clone, Debug)]
pub(crate) struct Frame<'a> {
    /// The URL that it is sent to.
    pub to: &'a str,
    /// A number of its own, `uuid:…`.
    pub message_id: &'a str,
    /// The largest answer that is wanted, in bytes.
    pub max_envelope_bytes: u32,
    /// How long the host may take.
    pub timeout: Duration,
}

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    resource: String,
    action: String,
    selectors: Vec<(String, String)>,
    body: String,
}

impl Operation {
    /// One instance by its path.
    pub fn get(path: &ObjectPath) -> Result<Self> {
        Ok(Self {
            resource: resource(&path.namespace, &path.class)?,
            action: format!("{TRANSFER}/Get"),
            selectors: selectors(path),
            body: String::new(),
        })
    }

    /// The first batch of what a query finds. Hosts take queries for all classes (`*`) only.
    pub fn query(namespace: &str, wql: &str) -> Result<Self> {
        let wql = text("a query", wql)?;
        Self::enumerate(namespace, &format!("<w:Filter Dialect=\"{WQL_DIALECT}\">{wql}</w:Filter>"))
    }

    /// The first batch of what an association leads to, or of its own instances.
    pub fn associated(
        path: &ObjectPath,
        association: &Association,
        instances_of_association: bool,
    ) -> Result<Self> {
        let optional = |tag: &str, value: Option<&String>| match value {
            Some(value) => text(tag, value).map(|value| format!("<b:{tag}>{value}</b:{tag}>")),
            None => Ok(String::new()),
        };
        let object = format!("<b:Object>{}</b:Object>", reference(path)?);
        let role = optional("Role", association.role.as_ref())?;
        let class = association.class.as_ref();
        let (tag, rest) = if instances_of_association {
            ("AssociationInstances", optional("ResultClassName", class)? + &role)
        } else {
            let results = optional("ResultClassName", association.result_class.as_ref())?;
            ("AssociatedInstances", optional("AssociationClassName", class)? + &role + &results)
        };
        Self::enumerate(
            &path.namespace,
            &format!(
                "<w:Filter Dialect=\"{ASSOCIATION_DIALECT}\"><b:{tag} xmlns:b=\"{BINDING}\">{object}{rest}</b:{tag}></w:Filter>"
            ),
        )
    }

    fn enumerate(namespace: &str, filter: &str) -> Result<Self> {
        Ok(Self {
            resource: resource(namespace, "*")?,
            action: format!("{ENUMERATION}/Enumerate"),
            selectors: Vec::new(),
            body: format!(
                "<n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>{MAX_ELEMENTS}</w:MaxElements>{filter}</n:Enumerate>"
            ),
        })
    }

    /// The next batch of an enumeration: of the very resource that it was begun on.
    pub fn pull(&self, context: &str) -> Result<Self> {
        let context = text("an enumeration's context", context)?;
        Ok(Self {
            resource: self.resource.clone(),
            action: format!("{ENUMERATION}/Pull"),
            selectors: Vec::new(),
            body: format!(
                "<n:Pull><n:EnumerationContext>{context}</n:EnumerationContext>\
                 <n:MaxElements>{MAX_ELEMENTS}</n:MaxElements></n:Pull>"
            ),
        })
    }

    /// The end of an enumeration before it is at its own.
    pub fn release(&self, context: &str) -> Result<Self> {
        let context = text("an enumeration's context", context)?;
        Ok(Self {
            resource: self.resource.clone(),
            action: format!("{ENUMERATION}/Release"),
            selectors: Vec::new(),
            body: format!(
                "<n:Release><n:EnumerationContext>{context}</n:EnumerationContext></n:Release>"
            ),
        })
    }

    /// A call of a method.
    pub fn invoke(
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<Self> {
        let resource = resource(&path.namespace, &path.class)?;
        let method = name("a method", method)?;
        let mut body = format!(
            "<p:{method}_INPUT xmlns:p=\"{resource}\" xmlns:c=\"{CIM}\" xmlns:xsi=\"{INSTANCE}\">"
        );
        for (parameter, value) in parameters {
            write_parameter(&mut body, name("a parameter", parameter)?, value)?;
        }
        // Writing to a string does not fail.
        let _ = write!(body, "</p:{method}_INPUT>");
        Ok(Self {
            action: format!("{resource}/{method}"),
            resource,
            selectors: selectors(path),
            body,
        })
    }

    /// The envelope.
    ///
    /// # Errors
    /// Where a key's name or value cannot stand in XML.
    pub fn envelope(&self, frame: &Frame<'_>) -> Result<String> {
        let to = text("a host's name", frame.to)?;
        let seconds = frame.timeout.as_secs_f64();
        Ok(format!(
            "<s:Envelope xmlns:s=\"{SOAP}\" xmlns:a=\"{ADDRESSING}\" xmlns:w=\"{MANAGEMENT}\" xmlns:n=\"{ENUMERATION}\">\
             <s:Header>\
             <a:To>{to}</a:To>\
             <w:ResourceURI s:mustUnderstand=\"true\">{resource}</w:ResourceURI>\
             <a:ReplyTo><a:Address s:mustUnderstand=\"true\">{ANONYMOUS}</a:Address></a:ReplyTo>\
             <a:Action s:mustUnderstand=\"true\">{action}</a:Action>\
             <w:MaxEnvelopeSize s:mustUnderstand=\"true\">{size}</w:MaxEnvelopeSize>\
             <a:MessageID>{id}</a:MessageID>\
             <w:Locale xml:lang=\"en-US\" s:mustUnderstand=\"false\"/>\
             {selectors}\
             <w:OperationTimeout>PT{seconds:.3}S</w:OperationTimeout>\
             </s:Header><s:Body>{body}</s:Body></s:Envelope>",
            resource = self.resource,
            action = self.action,
            size = frame.max_envelope_bytes,
            id = frame.message_id,
            selectors = selector_set(&self.selectors)?,
            body = self.body,
        ))
    }
}

fn write_parameter(body: &mut String, parameter: &str, value: &CimValue) -> Result<()> {
    let content = match value {
        CimValue::Array(_, items) => {
            // An array is its elements, one after another; an empty one is nothing.
            return items.iter().try_for_each(|item| write_parameter(body, parameter, item));
        }
        CimValue::Null => {
            let _ = write!(body, "<p:{parameter} xsi:nil=\"true\"/>");
            return Ok(());
        }
        CimValue::Reference(path) => reference(path)?,
        CimValue::String(string) => string_content(parameter, string)?,
        CimValue::DateTime(moment) => {
            let moment = crate::moment::to_xml(moment).ok_or_else(|| {
                CimError::protocol(parameter, "it is no moment in the form of CIM")
            })?;
            format!(
                "<c:{0}>{moment}</c:{0}>",
                if moment.starts_with('P') { "Interval" } else { "Datetime" }
            )
        }
        CimValue::Instance(instance) => {
            string_content(parameter, &vmtide_cim::xml::to_xml(instance)?)?
        }
        CimValue::Boolean(value) => value.to_string(),
        CimValue::Uint8(value) => value.to_string(),
        CimValue::Uint16(value) => value.to_string(),
        CimValue::Uint32(value) => value.to_string(),
        CimValue::Uint64(value) => value.to_string(),
        CimValue::Sint8(value) => value.to_string(),
        CimValue::Sint16(value) => value.to_string(),
        CimValue::Sint32(value) => value.to_string(),
        CimValue::Sint64(value) => value.to_string(),
        CimValue::Real32(value) => value.to_string(),
        CimValue::Real64(value) => value.to_string(),
    };
    let _ = write!(body, "<p:{parameter}>{content}</p:{parameter}>");
    Ok(())
}

/// Text, as character data where it is an embedded instance: the form that hosts are known to take.
fn string_content(parameter: &str, string: &str) -> Result<String> {
    if string.starts_with('<') && !string.contains('\r') {
        return xml::cdata(string).ok_or_else(|| unwritable(parameter));
    }
    text(parameter, string)
}

/// A reference to an object as libvirt sends it, which hosts take: address and parameters, without a wrap.
fn reference(path: &ObjectPath) -> Result<String> {
    Ok(format!(
        "<a:Address>{ANONYMOUS}</a:Address><a:ReferenceParameters><w:ResourceURI>{}</w:ResourceURI>{}</a:ReferenceParameters>",
        resource(&path.namespace, &path.class)?,
        selector_set(&selectors(path))?
    ))
}

fn selectors(path: &ObjectPath) -> Vec<(String, String)> {
    path.keys.iter().map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn selector_set(selectors: &[(String, String)]) -> Result<String> {
    if selectors.is_empty() {
        return Ok(String::new());
    }
    let mut set = String::from("<w:SelectorSet>");
    for (key, value) in selectors {
        let (key, value) = (name("a key", key)?, text(key, value)?);
        let _ = write!(set, "<w:Selector Name=\"{key}\">{value}</w:Selector>");
    }
    set.push_str("</w:SelectorSet>");
    Ok(set)
}

/// The resource of a class, `*` for all of the namespace.
fn resource(namespace: &str, class: &str) -> Result<String> {
    let namespace =
        if namespace.is_empty() { vmtide_cim::VIRTUALIZATION_NAMESPACE } else { namespace };
    for part in namespace.split(['\\', '/']) {
        name("a namespace", part)?;
    }
    let class = if class == "*" { class } else { name("a class", class)? };
    Ok(format!("{WMI}{}/{class}", namespace.replace('\\', "/")))
}

/// A name of CIM: nothing else may become the name of an element or a part of a URI.
fn name<'a>(what: &str, name: &'a str) -> Result<&'a str> {
    let sound = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if sound {
        Ok(name)
    } else {
        Err(CimError::protocol(what, format!("{name:?} is no name of CIM")))
    }
}

fn text(what: &str, text: &str) -> Result<String> {
    xml::escape(text).ok_or_else(|| unwritable(what))
}

fn unwritable(what: &str) -> CimError {
    CimError::protocol(what, "it has a control character, which XML cannot carry")
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_cim::{CimType, VIRTUALIZATION_NAMESPACE};

    fn frame() -> Frame<'static> {
        Frame {
            to: "http://hv1:5985/wsman",
            message_id: "uuid:11111111-2222-3333-4444-555555555555",
            max_envelope_bytes: 153_600,
            timeout: Duration::from_secs(60),
        }
    }

    const HEAD: &str = "<s:Envelope xmlns:s=\"http://www.w3.org/2003/05/soap-envelope\" \
        xmlns:a=\"http://schemas.xmlsoap.org/ws/2004/08/addressing\" \
        xmlns:w=\"http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd\" \
        xmlns:n=\"http://schemas.xmlsoap.org/ws/2004/09/enumeration\">\
        <s:Header><a:To>http://hv1:5985/wsman</a:To>\
        <w:ResourceURI s:mustUnderstand=\"true\">http://schemas.microsoft.com/wbem/wsman/1/wmi/root/virtualization/v2/";
    const MIDDLE: &str = "</w:ResourceURI>\
        <a:ReplyTo><a:Address s:mustUnderstand=\"true\">http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:Address></a:ReplyTo>\
        <a:Action s:mustUnderstand=\"true\">";
    const REST: &str = "</a:Action>\
        <w:MaxEnvelopeSize s:mustUnderstand=\"true\">153600</w:MaxEnvelopeSize>\
        <a:MessageID>uuid:11111111-2222-3333-4444-555555555555</a:MessageID>\
        <w:Locale xml:lang=\"en-US\" s:mustUnderstand=\"false\"/>";
    const END: &str = "<w:OperationTimeout>PT60.000S</w:OperationTimeout></s:Header><s:Body>";

    #[test]
    fn a_query_to_the_byte() {
        let operation =
            Operation::query(VIRTUALIZATION_NAMESPACE, "SELECT * FROM X WHERE A='<&'").unwrap();
        let expected = format!(
            "{HEAD}*{MIDDLE}http://schemas.xmlsoap.org/ws/2004/09/enumeration/Enumerate{REST}{END}\
             <n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>20</w:MaxElements>\
             <w:Filter Dialect=\"http://schemas.microsoft.com/wbem/wsman/1/WQL\">SELECT * FROM X WHERE A='&lt;&amp;'</w:Filter>\
             </n:Enumerate></s:Body></s:Envelope>"
        );
        assert_eq!(operation.envelope(&frame()).unwrap(), expected);
        let pull = operation.pull("uuid:c<1").unwrap().envelope(&frame()).unwrap();
        assert_eq!(
            pull,
            format!(
                "{HEAD}*{MIDDLE}http://schemas.xmlsoap.org/ws/2004/09/enumeration/Pull{REST}{END}\
                 <n:Pull><n:EnumerationContext>uuid:c&lt;1</n:EnumerationContext><n:MaxElements>20</n:MaxElements></n:Pull></s:Body></s:Envelope>"
            )
        );
    }

    #[test]
    fn a_get_to_the_byte() {
        let path = ObjectPath::new("Msvm_ConcreteJob", &[("InstanceID", r"A\B")]);
        assert_eq!(
            Operation::get(&path).unwrap().envelope(&frame()).unwrap(),
            format!(
                "{HEAD}Msvm_ConcreteJob{MIDDLE}http://schemas.xmlsoap.org/ws/2004/09/transfer/Get{REST}\
                 <w:SelectorSet><w:Selector Name=\"InstanceID\">A\\B</w:Selector></w:SelectorSet>{END}</s:Body></s:Envelope>"
            )
        );
    }

    #[test]
    fn a_call_to_the_byte() {
        let service = ObjectPath::new("Msvm_VirtualSystemSnapshotService", &[("Name", "vmms")]);
        let vm = ObjectPath::new(
            "Msvm_ComputerSystem",
            &[("CreationClassName", "Msvm_ComputerSystem"), ("Name", "G")],
        );
        let parameters = [
            ("AffectedSystem", CimValue::from(&vm)),
            ("SnapshotSettings", "<INSTANCE CLASSNAME=\"X\"><P>]]></P></INSTANCE>".into()),
            ("SnapshotType", CimValue::Uint16(32768)),
            (
                "Offsets",
                CimValue::Array(CimType::Uint64, vec![CimValue::Uint64(1), CimValue::Uint64(2)]),
            ),
            ("Force", true.into()),
            ("Path", r"C:\a & b".into()),
            ("Nothing", CimValue::Null),
        ];
        let made = Operation::invoke(&service, "CreateSnapshot", &parameters).unwrap();
        let uri = "http://schemas.microsoft.com/wbem/wsman/1/wmi/root/virtualization/v2/";
        let expected = format!(
            "{HEAD}Msvm_VirtualSystemSnapshotService{MIDDLE}{uri}Msvm_VirtualSystemSnapshotService/CreateSnapshot{REST}\
             <w:SelectorSet><w:Selector Name=\"Name\">vmms</w:Selector></w:SelectorSet>{END}\
             <p:CreateSnapshot_INPUT xmlns:p=\"{uri}Msvm_VirtualSystemSnapshotService\" \
             xmlns:c=\"http://schemas.dmtf.org/wbem/wscim/1/common\" xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\">\
             <p:AffectedSystem><a:Address>http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:Address>\
             <a:ReferenceParameters><w:ResourceURI>{uri}Msvm_ComputerSystem</w:ResourceURI>\
             <w:SelectorSet><w:Selector Name=\"CreationClassName\">Msvm_ComputerSystem</w:Selector>\
             <w:Selector Name=\"Name\">G</w:Selector></w:SelectorSet></a:ReferenceParameters></p:AffectedSystem>\
             <p:SnapshotSettings><![CDATA[<INSTANCE CLASSNAME=\"X\"><P>]]]]><![CDATA[></P></INSTANCE>]]></p:SnapshotSettings>\
             <p:SnapshotType>32768</p:SnapshotType><p:Offsets>1</p:Offsets><p:Offsets>2</p:Offsets><p:Force>true</p:Force>\
             <p:Path>C:\\a &amp; b</p:Path><p:Nothing xsi:nil=\"true\"/></p:CreateSnapshot_INPUT></s:Body></s:Envelope>"
        );
        assert_eq!(made.envelope(&frame()).unwrap(), expected);
    }

    #[test]
    fn instances_go_as_text() {
        let instance = vmtide_cim::CimInstance::new("X").with("N", CimValue::Uint8(7));
        let value = CimValue::Instance(Box::new(instance));
        let made = Operation::invoke(&ObjectPath::new("S", &[]), "M", &[("E", value)]).unwrap();
        assert!(made.body.contains(
            "<p:E><![CDATA[<INSTANCE CLASSNAME=\"X\"><PROPERTY NAME=\"N\" TYPE=\"uint8\"><VALUE>7</VALUE></PROPERTY></INSTANCE>]]></p:E>"
        ));
    }

    #[test]
    fn associations_by_both_forms() {
        let path = ObjectPath::new("Msvm_ConcreteJob", &[("InstanceID", "J")]);
        let association = Association {
            class: Some("Msvm_AffectedJobElement".into()),
            result_class: Some("CIM_ManagedElement".into()),
            role: Some("AffectingElement".into()),
        };
        let to = Operation::associated(&path, &association, false).unwrap();
        assert!(to.body.contains(
            "</b:Object><b:AssociationClassName>Msvm_AffectedJobElement</b:AssociationClassName>\
             <b:Role>AffectingElement</b:Role><b:ResultClassName>CIM_ManagedElement</b:ResultClassName></b:AssociatedInstances>"
        ));
        let of = Operation::associated(&path, &association, true).unwrap();
        assert!(of.body.contains(
            "</b:Object><b:ResultClassName>Msvm_AffectedJobElement</b:ResultClassName><b:Role>AffectingElement</b:Role></b:AssociationInstances>"
        ));
    }

    #[test]
    fn nothing_but_names_becomes_a_name() {
        let path = ObjectPath::new("X", &[]);
        for bad in ["", "a b", "a/b", "a>", "1a", "ä"] {
            assert!(Operation::invoke(&path, bad, &[]).is_err(), "{bad}");
            assert!(Operation::invoke(&path, "M", &[(bad, true.into())]).is_err(), "{bad}");
            assert!(Operation::get(&ObjectPath::new(bad, &[])).is_err(), "{bad}");
        }
        assert!(Operation::query(r"root\..\x", "SELECT").is_err());
        assert!(Operation::query("", "SELECT \0").is_err());
        let odd = ObjectPath::new("X", &[("a b", "1")]);
        assert!(Operation::get(&odd).unwrap().envelope(&frame()).is_err());
    }
}
