//! CIM-XML (DSP0201) of instances, as WMI reads and writes it under the name "DTD 2.0".
//!
//! Hyper-V's methods take settings as strings that hold an `<INSTANCE>`, and answer some questions in the
//! same form. [`to_xml`] writes what a method takes; [`from_xml`] reads what a host answers, with its
//! qualifiers left out. What is read is hostile: the text, its depth, its elements and every value are
//! bounded, and nothing is fetched or expanded (a document type is refused).

mod read;
mod tree;
mod write;

pub use read::from_xml;
pub use write::to_xml;

/// The most bytes of a document that are read or written. The largest real ones, settings of a VM, have
/// some 20 KiB.
pub const MAX_XML_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CimInstance, CimType, CimValue, ObjectPath};

    fn everything() -> CimInstance {
        let path = ObjectPath {
            host: Some("HV1".into()),
            ..ObjectPath::new("Msvm_X", &[("InstanceID", r#"Microsoft:A\B"<&"#), ("Name", "")])
        };
        let inner = CimInstance::new("Msvm_Inner").with("Name", "<in & out>");
        CimInstance::new("Msvm_Everything")
            .with("Text", "a <b> & \"c\" 'd' \r\n\té 字 ]]>")
            .with("Empty", "")
            .with("Spaces", "  kept  ")
            .with("Truth", true)
            .with("Byte", CimValue::Uint8(255))
            .with("Word", CimValue::Uint16(65_535))
            .with("Double", CimValue::Uint32(u32::MAX))
            .with("Quad", CimValue::Uint64(u64::MAX))
            .with("SByte", CimValue::Sint8(-128))
            .with("SWord", CimValue::Sint16(-32_768))
            .with("SDouble", CimValue::Sint32(i32::MIN))
            .with("SQuad", CimValue::Sint64(i64::MIN))
            .with("Real", CimValue::Real64(-1.5e300))
            .with("Small", CimValue::Real32(0.25))
            .with("When", CimValue::DateTime("20261121123000.000000+000".into()))
            .with("Where", &path)
            .with("Inner", CimValue::Instance(Box::new(inner.clone())))
            .with("Texts", CimValue::strings(["a", "", " <b> "]))
            .with("None", CimValue::Array(CimType::Uint16, vec![]))
            .with("Numbers", CimValue::Array(CimType::Uint16, vec![CimValue::Uint16(7)]))
            .with("Paths", CimValue::Array(CimType::Reference, vec![CimValue::Reference(path)]))
            .with(
                "Inners",
                CimValue::Array(CimType::Instance, vec![CimValue::Instance(Box::new(inner))]),
            )
    }

    #[test]
    fn what_is_written_is_read_again() {
        let instance = everything();
        let text = to_xml(&instance).unwrap();
        assert_eq!(from_xml(&text).unwrap(), instance, "{text}");
    }

    #[test]
    fn settings_of_a_checkpoint_are_written_as_hyper_v_documents_them() {
        let settings = CimInstance::new("Msvm_VirtualSystemSnapshotSettingData")
            .with("ConsistencyLevel", CimValue::Uint8(1))
            .with("Absent", CimValue::Null)
            .with("IgnoreNonSnapshottableDisks", true);
        assert_eq!(
            to_xml(&settings).unwrap(),
            "<INSTANCE CLASSNAME=\"Msvm_VirtualSystemSnapshotSettingData\">\
             <PROPERTY NAME=\"ConsistencyLevel\" TYPE=\"uint8\"><VALUE>1</VALUE></PROPERTY>\
             <PROPERTY NAME=\"IgnoreNonSnapshottableDisks\" TYPE=\"boolean\"><VALUE>TRUE</VALUE></PROPERTY>\
             </INSTANCE>"
        );
    }

    /// The form of `IWbemObjectTextSrc::GetText`: qualifiers, propagation, CDATA, properties without a value.
    const OF_WMI: &str = r#"<?xml version="1.0"?><!-- c --><DECLARATIONS><DECLGROUP><VALUE.OBJECT>
<INSTANCE CLASSNAME="Msvm_Error"><QUALIFIER NAME="dynamic" TYPE="boolean" TOSUBCLASS="false"><VALUE>TRUE</VALUE></QUALIFIER>
<PROPERTY NAME="Message" CLASSORIGIN="CIM_Error" PROPAGATED="true" TYPE="string"><QUALIFIER NAME="q" TYPE="string"><VALUE>no</VALUE></QUALIFIER><VALUE><![CDATA[it <failed>]]>: &#x41;&amp;B</VALUE></PROPERTY>
<PROPERTY NAME="OtherErrorType" TYPE="string"></PROPERTY>
<PROPERTY NAME="PerceivedSeverity" TYPE="uint16"><VALUE> 3 </VALUE></PROPERTY>
<PROPERTY.ARRAY NAME="MessageArguments" TYPE="string"><VALUE.ARRAY><VALUE>a</VALUE><VALUE.NULL/><VALUE/></VALUE.ARRAY></PROPERTY.ARRAY>
<PROPERTY.ARRAY NAME="NoArray" TYPE="uint16"/>
<PROPERTY.REFERENCE NAME="Element"><VALUE.REFERENCE><INSTANCEPATH><NAMESPACEPATH><HOST>HV1</HOST><LOCALNAMESPACEPATH><NAMESPACE NAME="root"/><NAMESPACE NAME="virtualization"/><NAMESPACE NAME="v2"/></LOCALNAMESPACEPATH></NAMESPACEPATH><INSTANCENAME CLASSNAME="Msvm_ConcreteJob"><KEYBINDING NAME="InstanceID"><KEYVALUE VALUETYPE="string">A-B</KEYVALUE></KEYBINDING></INSTANCENAME></INSTANCEPATH></VALUE.REFERENCE></PROPERTY.REFERENCE>
</INSTANCE></VALUE.OBJECT></DECLGROUP></DECLARATIONS>"#;

    #[test]
    fn what_wmi_writes_is_read() {
        let read = from_xml(OF_WMI).unwrap();
        assert_eq!(read.class, "Msvm_Error");
        assert_eq!(read.text("Message").unwrap(), "it <failed>: A&B");
        assert_eq!(read.optional_text("OtherErrorType").unwrap(), None);
        assert_eq!(read.number::<u16>("PerceivedSeverity").unwrap(), 3);
        assert_eq!(read.value("NoArray"), None);
        let arguments = read.value("MessageArguments").unwrap().elements();
        assert_eq!(arguments, [CimValue::from("a"), CimValue::Null, CimValue::from("")]);
        let element = read.optional_reference("Element").unwrap().unwrap();
        assert_eq!(
            element.to_string(),
            r#"\\HV1\root\virtualization\v2:Msvm_ConcreteJob.InstanceID="A-B""#
        );
    }

    /// What pywbem 1.x wrote after it had read the seed `0.xml` without its embedded objects, which are WMI's
    /// own and not in DSP0201: it understood every value of ours, and this is every value of its.
    const OF_PYWBEM: &str = include_str!("../../tests/data/pywbem.xml");

    #[test]
    fn what_pywbem_writes_is_read() {
        let mut expected = everything();
        expected
            .properties
            .retain(|(name, _)| !["Inner", "Inners", "Paths"].contains(&name.as_str()));
        // Ends of lines that stand there themselves are line feeds to every reader.
        let text = expected.text("Text").unwrap().replace("\r\n", "\n");
        expected.set("Text", text);
        assert_eq!(from_xml(OF_PYWBEM).unwrap(), expected);
    }

    #[test]
    fn broken_documents_are_refused() {
        let property = |inner: &str| format!("<INSTANCE CLASSNAME=\"X\">{inner}</INSTANCE>");
        for text in [
            String::new(),
            "no XML".into(),
            "<INSTANCE>".into(),
            "<INSTANCE/>".into(),
            "<OTHER/>".into(),
            "<INSTANCE CLASSNAME=\"X\"></PROPERTY>".into(),
            "<!DOCTYPE a [<!ENTITY b \"c\">]><INSTANCE CLASSNAME=\"X\"/>".into(),
            "<INSTANCE CLASSNAME=\"X\"/><INSTANCE CLASSNAME=\"Y\"/>".into(),
            property("<PROPERTY TYPE=\"string\"/>"),
            property("<PROPERTY NAME=\"A\"><VALUE>1</VALUE></PROPERTY>"),
            property("<PROPERTY NAME=\"A\" TYPE=\"uint99\"><VALUE>1</VALUE></PROPERTY>"),
            property("<PROPERTY NAME=\"A\" TYPE=\"uint8\"><VALUE>256</VALUE></PROPERTY>"),
            property("<PROPERTY NAME=\"A\" TYPE=\"uint8\"><VALUE>-1</VALUE></PROPERTY>"),
            property("<PROPERTY NAME=\"A\" TYPE=\"boolean\"><VALUE>yes</VALUE></PROPERTY>"),
            property("<PROPERTY NAME=\"A\" TYPE=\"string\"><VALUE>&other;</VALUE></PROPERTY>"),
            property("<PROPERTY NAME=\"A\" TYPE=\"string\"><VALUE/><VALUE/></PROPERTY>"),
            property(
                "<PROPERTY NAME=\"A\" TYPE=\"string\"/><PROPERTY NAME=\"a\" TYPE=\"string\"/>",
            ),
            property("<PROPERTY NAME=\"A\" NAME=\"B\" TYPE=\"string\"/>"),
            property("<PROPERTY.REFERENCE NAME=\"A\"><VALUE.REFERENCE/></PROPERTY.REFERENCE>"),
            property(&format!("{}{}", "<A>".repeat(100), "</A>".repeat(100))),
            property(&"<A/>".repeat(100_000)),
            format!("<INSTANCE CLASSNAME=\"X\">{}</INSTANCE>", "x".repeat(MAX_XML_BYTES)),
        ] {
            let shown: String = text.chars().take(100).collect();
            assert!(from_xml(&text).is_err(), "{shown}");
        }
    }

    #[test]
    fn what_xml_cannot_carry_is_refused() {
        assert!(to_xml(&CimInstance::new("X").with("A", "a\u{1}b")).is_err());
        assert!(to_xml(&CimInstance::new("X").with("A", "x".repeat(MAX_XML_BYTES))).is_err());
        let nested = CimValue::Array(CimType::String, vec![CimValue::strings(["a"])]);
        assert!(to_xml(&CimInstance::new("X").with("A", nested)).is_err());
        let mixed = CimValue::Array(CimType::String, vec![CimValue::Uint8(1)]);
        assert!(to_xml(&CimInstance::new("X").with("A", mixed)).is_err());
    }

    /// What the fuzz target runs, over the seeds and mutations of them.
    #[test]
    fn mutations_never_panic_and_are_stable() {
        let seeds = [to_xml(&everything()).unwrap(), OF_WMI.to_owned(), OF_PYWBEM.to_owned()];
        if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
            let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/cim_xml");
            std::fs::create_dir_all(directory).unwrap();
            for (index, seed) in seeds.iter().enumerate() {
                std::fs::write(format!("{directory}/{index}.xml"), seed).unwrap();
            }
        }
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % u64::try_from(below).unwrap()).unwrap()
        };
        for _ in 0..2_000 {
            let seed = seeds[random(seeds.len())].as_bytes();
            let mut bytes = seed.to_vec();
            for _ in 0..=random(4) {
                let at = random(bytes.len());
                match random(3) {
                    0 => bytes[at] = b"<>&\"/ A1;]["[random(11)],
                    1 => bytes.truncate(at.max(1)),
                    _ => {
                        let end = (at + random(40)).min(bytes.len());
                        let piece = bytes[at..end].to_vec();
                        bytes.splice(at..at, piece);
                    }
                }
            }
            crate::fuzzing::xml(&bytes);
        }
    }
}
