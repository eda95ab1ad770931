//! Answers: instances as WS-CIM writes them (DSP0230), batches of an enumeration, out parameters.
//!
//! All scalars are text; the accessors of [`CimInstance`] make numbers of them. An array is an element that
//! occurs more than once, so that one of one element looks like a scalar.

use crate::moment;
use crate::xml::Element;
use std::collections::HashMap;
use vmtide_cim::{CimInstance, CimType, CimValue, MethodOutput, ObjectPath};
pub(crate) use vmtide_sspi::one_line as short;

/// What every resource of WMI has in its name. Hosts write what is before it in more than one way.
const WMI_PATH: &str = "/wbem/wsman/1/wmi/";

/// The longest key of a path; as long as a path in text may be.
const MAX_KEY_BYTES: usize = 16 << 10;

/// What went wrong in an answer, as a phrase.
pub(crate) type Read<T> = Result<T, String>;

/// The body's one element; the answer's envelope has been read.
///
/// # Errors
/// Where this is no envelope, or answers another request than the one with `message_id`.
pub(crate) fn body<'a>(
    envelope: &'a Element,
    message_id: Option<&str>,
) -> Read<Option<&'a Element>> {
    if envelope.name != "Envelope" {
        return Err(format!("the answer is no SOAP envelope but <{}>", short(&envelope.name)));
    }
    let related = envelope.descend(&["Header", "RelatesTo"]).map(|related| related.text.trim());
    if let (Some(related), Some(message_id)) = (related, message_id)
        && !related.eq_ignore_ascii_case(message_id)
    {
        return Err("the answer is one to another request".into());
    }
    let body = envelope.child("Body").ok_or("the answer has no body")?;
    Ok(body.children.first())
}

/// One batch of an enumeration.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Batch {
    /// What was found.
    pub instances: Vec<CimInstance>,
    /// What the next batch is asked for with; none at the end.
    pub context: Option<String>,
}

/// A batch, of the answer to Enumerate or to Pull.
///
/// # Errors
/// Where it is neither, or has neither an end nor a context.
pub(crate) fn batch(element: &Element, namespace: &str, queried_class: &str) -> Read<Batch> {
    if !matches!(element.name.as_str(), "EnumerateResponse" | "PullResponse") {
        return Err(format!("<{}> came where a batch was expected", short(&element.name)));
    }
    let mut instances = Vec::new();
    for item in element.child("Items").map_or(&[][..], |items| items.children.as_slice()) {
        instances.push(item_instance(item, namespace, queried_class)?);
    }
    if element.child("EndOfSequence").is_some() {
        return Ok(Batch { instances, context: None });
    }
    let context = element
        .child("EnumerationContext")
        .map(|context| context.text.trim().to_owned())
        .filter(|context| !context.is_empty())
        .ok_or("a batch has neither an end nor a context for the next")?;
    Ok(Batch { instances, context: Some(context) })
}

/// An item is an instance, one with its address beside it, or a fragment of one where the query named properties.
fn item_instance(item: &Element, namespace: &str, queried_class: &str) -> Read<CimInstance> {
    match item.name.as_str() {
        "Item" => {
            let object = item.children.iter().find(|child| child.name != "EndpointReference");
            let object = object.ok_or("an item of a batch has no instance")?;
            let mut instance = instance(object, namespace)?;
            if let Some(address) = item.child("EndpointReference").and_then(endpoint) {
                instance.path = Some(address);
            }
            Ok(instance)
        }
        "XmlFragment" => {
            let mut fragment = instance(item, namespace)?;
            fragment.class = queried_class.to_owned();
            fragment.path = derived_path(&fragment, namespace);
            Ok(fragment)
        }
        _ => instance(item, namespace),
    }
}

/// An instance.
///
/// # Errors
/// Where its class has no name of CIM.
pub(crate) fn instance(element: &Element, namespace: &str) -> Read<CimInstance> {
    let mut instance = CimInstance { class: class_of(element), ..CimInstance::default() };
    instance.properties = properties(element);
    instance.path = derived_path(&instance, namespace);
    Ok(instance)
}

/// The class that the answer says, which may be a subclass of the element's.
fn class_of(element: &Element) -> String {
    let kind = element.attribute("type").and_then(|kind| kind.rsplit(':').next());
    kind.and_then(|kind| kind.strip_suffix("_Type")).unwrap_or(&element.name).to_owned()
}

/// The properties in their order; equal names are one array, also where others stand between them: an element that
/// is not looked at could be a change that is not backed up.
fn properties(element: &Element) -> Vec<(String, CimValue)> {
    let mut properties: Vec<(String, CimValue)> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for child in &element.children {
        let value = value(child);
        let place = *places.entry(child.name.to_ascii_lowercase()).or_insert(properties.len());
        match properties.get_mut(place) {
            Some((_, known)) => append(known, value),
            None => properties.push((child.name.clone(), value)),
        }
    }
    properties
}

fn append(known: &mut CimValue, value: CimValue) {
    if let CimValue::Array(_, items) = known {
        items.push(value);
        return;
    }
    let kind = known.cim_type().or(value.cim_type()).unwrap_or(CimType::String);
    let first = std::mem::replace(known, CimValue::Null);
    *known = CimValue::Array(kind, vec![first, value]);
}

/// The value of one element.
fn value(element: &Element) -> CimValue {
    if element.is_nil() {
        return CimValue::Null;
    }
    if let Some(path) = endpoint(element) {
        return CimValue::Reference(path);
    }
    match element.children.as_slice() {
        [] => CimValue::String(element.text.clone()),
        [only] if matches!(only.name.as_str(), "Datetime" | "Interval" | "Date" | "Time") => {
            match moment::from_xml(&only.text) {
                Some(moment) => CimValue::DateTime(moment),
                None => CimValue::String(only.text.clone()),
            }
        }
        _ => CimValue::Instance(Box::new(CimInstance {
            class: class_of(element),
            path: None,
            properties: properties(element),
        })),
    }
}

/// The object that an endpoint reference names, with or without an element of that name around it.
fn endpoint(element: &Element) -> Option<ObjectPath> {
    let element = element.child("EndpointReference").unwrap_or(element);
    let parameters = element.child("ReferenceParameters")?;
    let resource = parameters.child("ResourceURI")?.text.trim();
    let mut path = resource_path(resource)?;
    for selector in parameters.child("SelectorSet").map_or(&[][..], |set| set.children.as_slice()) {
        let name = selector.attribute("Name")?;
        let value = match endpoint(selector) {
            // A key that is itself a reference. As text it may be twice as long, and so at each level.
            Some(inner) => inner.to_string(),
            None => selector.text.clone(),
        };
        if value.len() > MAX_KEY_BYTES {
            return None;
        }
        if name.eq_ignore_ascii_case("__cimnamespace") {
            path.namespace = value.replace('/', r"\");
        } else {
            path.keys.insert(name.to_owned(), value);
        }
    }
    Some(path)
}

/// Namespace and class of a resource. Only WMI's are objects that we know.
fn resource_path(resource: &str) -> Option<ObjectPath> {
    let at = resource.to_ascii_lowercase().find(WMI_PATH)?;
    let rest = resource.get(at + WMI_PATH.len()..)?;
    let (namespace, class) = rest.rsplit_once('/')?;
    let mut path = ObjectPath::new(class, &[]);
    path.namespace = namespace.replace('/', r"\");
    let named = !class.is_empty() && class.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    named.then_some(path)
}

/// The path of an instance of Hyper-V's namespace: hosts do not tell it, but all classes there have one of
/// three sets of keys. Devices have `DeviceID`, systems and services `Name`, both within a
/// `CreationClassName`; all else has `InstanceID`. Of other namespaces we do not know.
fn derived_path(instance: &CimInstance, namespace: &str) -> Option<ObjectPath> {
    let ours = instance.class.starts_with("Msvm_") || instance.class.starts_with("CIM_");
    let text = |name: &str| instance.value(name).and_then(CimValue::as_str);
    if !ours || instance.class.len() > 256 {
        return None;
    }
    let mut path = ObjectPath::new(&instance.class, &[]);
    path.namespace = namespace.into();
    let scope = ["SystemCreationClassName", "SystemName", "CreationClassName"];
    let own = if text("DeviceID").is_some() { "DeviceID" } else { "Name" };
    let names: &[&str] = match (text("CreationClassName"), text(own), text("SystemName")) {
        (Some(_), Some(_), Some(_)) => &scope,
        (Some(_), Some(_), None) => &scope[2..],
        _ => &[],
    };
    let keys = match names {
        [] => vec!["InstanceID"],
        scope => scope.iter().copied().chain([own]).collect(),
    };
    for key in keys {
        path.keys.insert(key.to_owned(), text(key)?.to_owned());
    }
    Some(path)
}

/// What a method answered.
///
/// # Errors
/// Where it is another method's answer, or has no return value.
pub(crate) fn method_output(element: &Element, method: &str) -> Read<MethodOutput> {
    let expected = format!("{method}_OUTPUT");
    if !element.name.eq_ignore_ascii_case(&expected) {
        return Err(format!("<{}> came where {expected} was expected", short(&element.name)));
    }
    let mut parameters = CimInstance { properties: properties(element), ..CimInstance::default() };
    let at =
        parameters.properties.iter().position(|(name, _)| name.eq_ignore_ascii_case("ReturnValue"));
    let code = at.map(|at| parameters.properties.remove(at).1);
    let return_value = code
        .and_then(|code| code.as_u64())
        .and_then(|code| u32::try_from(code).ok())
        .ok_or_else(|| format!("{expected} has no ReturnValue"))?;
    Ok(MethodOutput { return_value, parameters })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::parse;

    const NS: &str = r"root\virtualization\v2";

    fn read(text: &str) -> Element {
        parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn arrays_whose_elements_alternate_are_whole() {
        let changes = read(
            "<O><Offset>0</Offset><Length>1</Length><Offset>8</Offset><length>2</length>\
             <Offset>9</Offset></O>",
        );
        let instance = instance(&changes, NS).unwrap();
        assert_eq!(instance.numbers("Offset").unwrap(), [0, 8, 9]);
        assert_eq!(instance.numbers("Length").unwrap(), [1, 2]);
        assert_eq!(instance.properties.len(), 2);
    }

    #[test]
    fn references_in_references_do_not_grow_without_an_end() {
        let mut key = r"\".repeat(4 << 10);
        for _ in 0..3 {
            key = format!(
                "<R><ReferenceParameters><ResourceURI>http://x/wbem/wsman/1/wmi/root/a/B</ResourceURI><SelectorSet>\
                 <Selector Name=\"K\">{key}</Selector></SelectorSet></ReferenceParameters></R>"
            );
            key = key.replacen("<R>", "", 1);
            key.truncate(key.len() - "</R>".len());
        }
        let paths = |text: &str| endpoint(&read(&format!("<R>{text}</R>")));
        assert_eq!(paths(&key), None);
        assert!(paths(&key.replace('\\', "")).is_some());
    }

    #[test]
    fn instances_as_hosts_write_them() {
        let element = read(
            r#"<p:Msvm_ConcreteJob xmlns:p="u" xmlns:xsi="i" xmlns:cim="c" xsi:type="p:Msvm_StorageJob_Type">
              <p:ElapsedTime><cim:Interval>P0DT0H0M1.5S</cim:Interval></p:ElapsedTime>
              <p:ErrorDescription xsi:nil="true"/><p:InstanceID>J1</p:InstanceID><p:Name> spaces </p:Name>
              <p:OperationalStatus>2</p:OperationalStatus><p:OperationalStatus>3</p:OperationalStatus>
              <p:StartTime><cim:Datetime>2026-11-21T12:30:00Z</cim:Datetime></p:StartTime><p:Empty></p:Empty>
              <p:Job><a:Address xmlns:a="a">x</a:Address><a:ReferenceParameters xmlns:a="a" xmlns:w="w">
              <w:ResourceURI>http://schemas.microsoft.com/wbem/wsman/1/wmi/root/virtualization/v2/Msvm_ConcreteJob</w:ResourceURI>
              <w:SelectorSet><w:Selector Name="InstanceID">A\B</w:Selector><w:Selector Name="__cimnamespace">root/virtualization/v2</w:Selector></w:SelectorSet>
              </a:ReferenceParameters></p:Job><p:Setting xsi:type="p:Msvm_X_Type"><p:A>1</p:A></p:Setting></p:Msvm_ConcreteJob>"#,
        );
        let instance = instance(&element, NS).unwrap();
        assert_eq!(instance.class, "Msvm_StorageJob");
        assert_eq!(
            instance.value("ElapsedTime"),
            Some(&CimValue::DateTime("00000000000001.500000:000".into()))
        );
        assert_eq!(
            instance.value("StartTime"),
            Some(&CimValue::DateTime("20261121123000.000000+000".into()))
        );
        assert_eq!(instance.value("ErrorDescription"), None);
        assert_eq!(instance.text("Name").unwrap(), " spaces ");
        assert_eq!(instance.text("Empty").unwrap(), "");
        assert_eq!(instance.numbers("OperationalStatus").unwrap(), [2, 3]);
        let job = instance.optional_reference("Job").unwrap().unwrap();
        assert_eq!(job.to_string(), r#"root\virtualization\v2:Msvm_ConcreteJob.InstanceID="A\\B""#);
        assert!(
            matches!(instance.value("Setting"), Some(CimValue::Instance(inner)) if inner.class == "Msvm_X")
        );
        assert_eq!(
            instance.path.unwrap().to_string(),
            r#"root\virtualization\v2:Msvm_StorageJob.InstanceID="J1""#
        );
    }

    #[test]
    fn paths_by_the_keys_of_their_kind() {
        for (properties, path) in [
            (
                "<CreationClassName>Msvm_X</CreationClassName><InstanceID>i</InstanceID><Name>n</Name>",
                r#"Msvm_X.CreationClassName="Msvm_X",Name="n""#,
            ),
            (
                "<SystemName>s</SystemName><SystemCreationClassName>S</SystemCreationClassName><CreationClassName>C</CreationClassName><Name>vmms</Name>",
                r#"Msvm_X.CreationClassName="C",Name="vmms",SystemCreationClassName="S",SystemName="s""#,
            ),
            (
                "<SystemName>s</SystemName><SystemCreationClassName>S</SystemCreationClassName><CreationClassName>C</CreationClassName><Name>vmms</Name><DeviceID>d</DeviceID>",
                r#"Msvm_X.CreationClassName="C",DeviceID="d",SystemCreationClassName="S",SystemName="s""#,
            ),
            ("<InstanceID>i</InstanceID><Name>job</Name>", r#"Msvm_X.InstanceID="i""#),
        ] {
            let element = read(&format!("<Msvm_X>{properties}</Msvm_X>"));
            assert_eq!(instance(&element, "").unwrap().path.unwrap().to_string(), path);
        }
        assert_eq!(instance(&read("<Msvm_X><Name>n</Name></Msvm_X>"), "").unwrap().path, None);
        assert_eq!(
            instance(
                &read("<Win32_X><Name>n</Name><CreationClassName>c</CreationClassName></Win32_X>"),
                ""
            )
            .unwrap()
            .path,
            None
        );
    }

    #[test]
    fn batches_end_or_go_on() {
        let end = read(
            "<n:PullResponse><n:Items><p:X><p:A>1</p:A></p:X><p:X/></n:Items><n:EndOfSequence/></n:PullResponse>",
        );
        let found = batch(&end, NS, "X").unwrap();
        assert_eq!((found.instances.len(), found.context), (2, None));
        let on = read(
            "<n:EnumerateResponse><n:EnumerationContext>uuid:1</n:EnumerationContext></n:EnumerateResponse>",
        );
        assert_eq!(
            batch(&on, NS, "X").unwrap(),
            Batch { instances: vec![], context: Some("uuid:1".into()) }
        );
        let named = read(
            "<PullResponse><Items><w:XmlFragment><p:Name>n</p:Name><p:CreationClassName>c</p:CreationClassName></w:XmlFragment></Items><EndOfSequence/></PullResponse>",
        );
        let named = batch(&named, NS, "Msvm_X").unwrap();
        assert_eq!(named.instances[0].class, "Msvm_X");
        assert!(named.instances[0].path.is_some());
        for bad in [
            "<X/>",
            "<PullResponse/>",
            "<PullResponse><Items><Item/></Items><EndOfSequence/></PullResponse>",
        ] {
            assert!(batch(&read(bad), NS, "X").is_err(), "{bad}");
        }
    }

    #[test]
    fn methods_answer_with_a_code() {
        let output = read(
            "<p:M_OUTPUT><p:ChangedByteOffsets>0</p:ChangedByteOffsets><p:ChangedByteOffsets>9</p:ChangedByteOffsets><p:ReturnValue>4096</p:ReturnValue></p:M_OUTPUT>",
        );
        let output = method_output(&output, "M").unwrap();
        assert_eq!(output.return_value, 4096);
        assert_eq!(output.parameters.numbers("ChangedByteOffsets").unwrap(), [0, 9]);
        assert_eq!(output.parameters.properties.len(), 1);
        for bad in [
            "<M_OUTPUT/>",
            "<N_OUTPUT><ReturnValue>0</ReturnValue></N_OUTPUT>",
            "<M_OUTPUT><ReturnValue>-1</ReturnValue></M_OUTPUT>",
        ] {
            assert!(method_output(&read(bad), "M").is_err(), "{bad}");
        }
    }

    #[test]
    fn an_answer_belongs_to_its_request() {
        let envelope = read(
            "<s:Envelope><s:Header><a:RelatesTo>uuid:A</a:RelatesTo></s:Header><s:Body><x/></s:Body></s:Envelope>",
        );
        assert!(body(&envelope, Some("uuid:a")).unwrap().is_some());
        assert!(body(&envelope, Some("uuid:b")).is_err());
        assert!(body(&read("<x/>"), None).is_err());
        assert!(body(&read("<Envelope/>"), None).is_err());
    }

    #[test]
    fn foreign_words_stay_on_one_line() {
        assert_eq!(short("a\n\t b\x1b[2J"), "a b[2J");
        assert!(short(&"x ".repeat(1000)).chars().count() <= 301);
    }
}
