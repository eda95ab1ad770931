//! The names of WS-Management: namespaces, actions, dialects, resource URIs.

use vmtide_cim::ObjectPath;

pub const SOAP: &str = "http://www.w3.org/2003/05/soap-envelope";
pub const ADDRESSING: &str = "http://schemas.xmlsoap.org/ws/2004/08/addressing";
pub const WSMAN: &str = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd";
pub const ENUMERATION: &str = "http://schemas.xmlsoap.org/ws/2004/09/enumeration";
pub const TRANSFER: &str = "http://schemas.xmlsoap.org/ws/2004/09/transfer";
pub const MICROSOFT: &str = "http://schemas.microsoft.com/wbem/wsman/1/wsman.xsd";
pub const IDENTITY: &str = "http://schemas.dmtf.org/wbem/wsman/identity/1/wsmanidentity.xsd";
pub const WSMAN_FAULT: &str = "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault";
pub const CIM_COMMON: &str = "http://schemas.dmtf.org/wbem/wscim/1/common";
pub const CIM_BINDING: &str = "http://schemas.dmtf.org/wbem/wsman/1/cimbinding.xsd";
pub const XSI: &str = "http://www.w3.org/2001/XMLSchema-instance";

pub const ANONYMOUS: &str = "http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous";
pub const ACTION_GET: &str = "http://schemas.xmlsoap.org/ws/2004/09/transfer/Get";
pub const ACTION_ENUMERATE: &str = "http://schemas.xmlsoap.org/ws/2004/09/enumeration/Enumerate";
pub const ACTION_PULL: &str = "http://schemas.xmlsoap.org/ws/2004/09/enumeration/Pull";
pub const ACTION_RELEASE: &str = "http://schemas.xmlsoap.org/ws/2004/09/enumeration/Release";
pub const ACTION_FAULT: &str = "http://schemas.dmtf.org/wbem/wsman/1/wsman/fault";
pub const ACTION_ADDRESSING_FAULT: &str = "http://schemas.xmlsoap.org/ws/2004/08/addressing/fault";

pub const DIALECT_WQL: &str = "http://schemas.microsoft.com/wbem/wsman/1/WQL";
pub const DIALECT_ASSOCIATION: &str =
    "http://schemas.dmtf.org/wbem/wsman/1/cimbinding/associationFilter";

/// The service's own settings, of which only the limit on envelopes is served.
pub const CONFIG: &str = "http://schemas.microsoft.com/wbem/wsman/1/config";

/// Where WMI's classes are (MS-WSMV 2.2.4.39); the namespace and the class follow, with slashes.
const WMI: &str = "http://schemas.microsoft.com/wbem/wsman/1/wmi/";

/// The resource URI of a class, or of all of a namespace with `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The namespace with backslashes.
    pub namespace: String,
    /// The class, or `*`.
    pub class: String,
}

impl Resource {
    /// Reads one; none for anything else than a class of WMI.
    pub fn parse(uri: &str) -> Option<Self> {
        let rest = uri.strip_prefix(WMI)?;
        let (namespace, class) = rest.rsplit_once('/')?;
        let word = |part: &str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        let good = namespace.split('/').all(word) && (class == "*" || word(class));
        good.then(|| Self { namespace: namespace.replace('/', r"\"), class: class.into() })
    }

    /// Whether it names no class but all of the namespace.
    pub fn is_all(&self) -> bool {
        self.class == "*"
    }
}

/// The resource URI of an object's class.
pub fn of_path(path: &ObjectPath) -> String {
    of_class(&path.namespace, &path.class)
}

/// The resource URI of a class.
pub fn of_class(namespace: &str, class: &str) -> String {
    format!("{WMI}{}/{class}", namespace.replace('\\', "/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resource_uris_name_classes_of_wmi_only() {
        let uri = of_class(r"root\virtualization\v2", "Msvm_ComputerSystem");
        let resource = Resource::parse(&uri).unwrap();
        assert_eq!(
            (resource.namespace.as_str(), resource.class.as_str()),
            (r"root\virtualization\v2", "Msvm_ComputerSystem")
        );
        assert!(Resource::parse(&of_class("root\\cimv2", "*")).unwrap().is_all());
        for bad in ["", "http://x/y", WMI, &format!("{WMI}root//X"), &format!("{WMI}root/v2/X Y")] {
            assert_eq!(Resource::parse(bad), None, "{bad}");
        }
    }
}
